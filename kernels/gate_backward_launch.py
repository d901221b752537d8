"""Launches the backward kernels of a gate: tile sizes, grids, and the buffers that they fill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gate_backward import SUMS, gate_backward_logits, gate_backward_rows
from .gate_backward_dense import gate_backward_dense
from .gate_launch import GateForward, features_of, tail_tiles
from .launch import ceil_div, gradient_like, on_device, positions, power_of_two

PROGRAMS = 264  # that the last launch should have at least: two for each multiprocessor of a large GPU
FEW_FEATURES = 1024  # up to which tiles are smaller, so that more programs share them


def backward(
    d_gate: Tensor | None,
    d_rate: Tensor | None,
    d_logits: Tensor | None,
    features: Tensor,
    saved: GateForward,
    weight1: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight2: Tensor,
    noise: Tensor | None,
    *,
    estimator: str,
    temperature: float,
    train: bool,
    batch_stats: bool,
    need_dx: bool,
    pixels: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of features, weight1, bias1, norm_weight, norm_bias, weight2, bias2; empty if none.

    Where ``features`` (N, C) are the mean of ``pixels`` positions, their gradient is that of one position, in
    ``dtype``: it is the same for all of them. It lies as `gradient_like` says; empty where it is not needed.
    """
    batch, gates = saved.logits.shape
    hidden = saved.hidden.shape[1]
    new: dict[str, Any] = {"device": features.device, "dtype": torch.float32}
    incoming = tuple(None if d is None else d.contiguous() for d in (d_gate, d_rate, d_logits))
    noise = None if noise is None else noise.contiguous()
    flags = {
        "CENTRE": estimator == "batch_mean" and train and not (d_gate is None and d_rate is None),
        "HAS_GATE": d_gate is not None,
        "HAS_RATE": d_rate is not None,
        "HAS_LOGITS": d_logits is not None,
        "ESTIMATOR": estimator,
        "NOISY": noise is not None,
    }
    decision = (*incoming, saved.logits, noise, saved.threshold)
    d_bias2 = torch.empty(gates, **new)
    if features.dim() == 4:
        features = positions(features)[0]
    dx = gradient_like(features, dtype) if need_dx else torch.empty(0, **new)
    with on_device(features):
        if weight1 is None:
            dz = torch.empty(batch, gates, **new)
            gate_backward_logits[(ceil_div(gates, 16),)](
                dz, d_bias2, *decision, batch, gates, temperature, **flags, BLOCK_N=64, BLOCK_O=16
            )
            d_first, *rest = _dense(dx, dz, None, saved, None, None, features, weight2, 1 / pixels, need_dx)
            return dx, torch.empty(0, 0, **new), *rest, d_first, d_bias2
        tiles = tail_tiles(hidden)
        row_tiles = ceil_div(batch, tiles["BLOCK_N"])
        da, sums = torch.empty(batch, hidden, **new), torch.empty(SUMS, row_tiles, hidden, **new)
        d_second = torch.empty(gates, hidden, **new)
        gate_backward_rows[(row_tiles + ceil_div(gates, tiles["BLOCK_O"]),)](
            da, sums, d_second, d_bias2, saved.hidden, saved.stat, norm_weight, norm_bias, weight2, *decision, batch,
            hidden, gates, row_tiles, temperature, **flags, **tiles,
        )  # fmt: skip
        d_first, *rest = _dense(
            dx, da, sums, saved, norm_weight, norm_bias, features, weight1, 1 / pixels, need_dx,
            BATCH_STATS=batch_stats, CENTRE=flags["CENTRE"],
        )  # fmt: skip
    return dx, d_first, *rest, d_second, d_bias2


def _dense(
    dx: Tensor,
    dh: Tensor,
    sums: Tensor | None,
    saved: GateForward,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: float,
    need_dx: bool,
    **flags: bool,
) -> tuple[Tensor, ...]:
    """Fill dx; gradients of weight, and of the layer's bias, the norm's weight and bias behind it."""
    x, strides, pixels = features_of(x)
    units, features = weight.shape
    batch = x.shape[0]
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    norm = [torch.empty(0 if sums is None else units, device=x.device, dtype=torch.float32) for _ in range(3)]
    block_n, block_k = (32, 16) if features <= FEW_FEATURES else (16, 32)
    columns = ceil_div(features, block_k)
    groups = min(ceil_div(batch, block_n), ceil_div(PROGRAMS, columns))
    per_group = ceil_div(ceil_div(batch, groups), block_n) * block_n
    row_tiles = 1 if sums is None else sums.shape[1]
    gate_backward_dense[(columns, 1 + ceil_div(batch, per_group) if need_dx else 1)](
        dx, *(features_of(dx)[1] if need_dx else strides), d_weight, *norm, dh, sums, saved.hidden, saved.stat,
        norm_weight, norm_bias, x, *strides, weight, batch, features, pixels, units, row_tiles, per_group, scale,
        HIDDEN=sums is not None, BATCH_STATS=flags.get("BATCH_STATS", False), CENTRE=flags.get("CENTRE", False),
        BLOCK_N=block_n, BLOCK_M=power_of_two(units, 16, 32), BLOCK_K=block_k, BLOCK_T=16, num_stages=2,
    )  # fmt: skip
    return d_weight, *norm
