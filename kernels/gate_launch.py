"""Launches the forward kernels of a gate: tile sizes, grids, and the buffers that they fill."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gate_rows import gate_dense, gate_pool_dense, gate_pool_wide
from .gate_tail import gate_tail
from .launch import TILE, ceil_div, on_device, positions, power_of_two
from .ticket import ticket

DENSE_ROWS = 16
SPLIT_ABOVE = 1 << 16  # elements of a sample above which its channels are shared out to several programs
POOL_UNITS = 64  # units of the first layer above which a program pools several samples: the weight tile spills
# Tiles of gates by samples that one program may go through. Above, it takes longer than a second launch; where noise
# is a launch already, it may take longer, so that forward and backward stay at four.
LAST_PROGRAM_TILES, LAST_PROGRAM_TILES_NOISY = 16, 64


class GateForward(NamedTuple):
    """What a forward computes; all fp32 but ``gate``.

    gate (N, O); rate (O,); logits (N, O); pooled (N, C), empty if nothing was pooled; hidden (N, H); stat (3, H):
    mean, 1 / sqrt(var + eps), variance (of the batch: unbiased); threshold (O,).
    """

    gate: Tensor
    rate: Tensor
    logits: Tensor
    pooled: Tensor
    hidden: Tensor
    stat: Tensor
    threshold: Tensor


class Running(NamedTuple):
    """Buffers that a training forward moves in place: fp32, ``batches`` int64 (); a None is not kept."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None
    rate: Tensor | None
    threshold: Tensor | None


def forward(
    x: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    noise: Tensor | None,
    running: Running,
    *,
    estimator: str,
    train: bool,
    batch_stats: bool,
    update: bool,
    flatten: bool,
    eps: float,
    norm_momentum: float,
    momentum: float,
    dtype: torch.dtype,
    one_launch: bool = True,
) -> GateForward:
    """Decide for x (N, C, H, W), pooled unless ``flatten``, or for features x (N, K).

    ``one_launch`` allows the last program of the row pass to run the tail; without it there are always two launches
    and no counter, which is what memory that is not ours to keep needs.
    """
    batch, gates = x.shape[0], weight2.shape[0]
    first = weight2 if weight1 is None else weight1
    units, hidden = first.shape[0], 0 if weight1 is None else weight1.shape[0]
    pooling = x.dim() == 4 and not flatten
    slices, per_slice = _shares(x, units, first.shape[1], pooling)
    new: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    out = GateForward(
        torch.empty(batch, gates, device=x.device, dtype=dtype),
        torch.empty(gates, **new),
        torch.empty(batch, gates, **new),
        torch.empty((batch, x.shape[1]) if pooling else (0,), **new),
        torch.empty(batch, hidden, **new),
        torch.empty(3, hidden, **new),
        torch.empty(gates, **new),
    )
    part = torch.empty(slices, batch, units, **new)
    noise = None if noise is None else noise.contiguous()
    buffers = (out.gate, out.rate, out.logits, out.hidden, out.stat, out.threshold, part, bias1, norm_weight, norm_bias)
    tail = (*buffers, weight2, bias2, noise, *running, batch, slices, hidden, gates, eps, norm_momentum, momentum)
    options = {
        "HIDDEN": weight1 is not None,
        "BATCH_STATS": batch_stats,
        "UPDATE": update,
        "TRAIN": train,
        "ESTIMATOR": estimator,
        "NOISY": noise is not None,
    }
    last = _last_program(batch, gates, hidden, noise is not None) if one_launch else None
    wide = pooling and units > POOL_UNITS
    with on_device(x):
        counter = None if last is None else ticket(x)
        options |= tail_tiles(hidden) if counter is None or last is None else last
        if wide:
            _pool_wide(x, first, out.pooled, counter, slices, tail, options)
        elif pooling:
            _pool(x, first, out.pooled, counter, slices, per_slice, tail, options)
        else:
            _dense(x, first, counter, slices, per_slice, tail, options)
        if counter is None:
            gate_tail[(ceil_div(gates, options["BLOCK_O"]),)](*tail, **options)
    return out


def tail_tiles(hidden: int) -> dict[str, Any]:
    """Tiles of a tail: 1024 numbers of the hidden layer at a time; loops too short to pipeline."""
    block_h = power_of_two(hidden, 16)
    return {"BLOCK_N": max(16, 1024 // block_h), "BLOCK_H": block_h, "BLOCK_O": 16, "num_stages": 1}


def features_of(x: Tensor) -> tuple[Tensor, tuple[int, int, int], int]:
    """Features or a map to flatten: tensor, strides (sample, channel, position), positions a channel."""
    if x.dim() == 2:
        return x, (x.stride(0), x.stride(1), 0), 1
    x, strides = positions(x)
    return x, strides, x.shape[2] * x.shape[3]


def _last_program(batch: int, gates: int, hidden: int, noisy: bool) -> dict[str, Any] | None:
    """Tiles of a tail that one program goes through; None where that is too much for one."""
    tiles = tail_tiles(hidden)
    if hidden <= 32:
        tiles["BLOCK_O"] = power_of_two(gates, 16, 32)
    steps = ceil_div(batch, tiles["BLOCK_N"]) * ceil_div(gates, 16)
    return tiles if steps <= (LAST_PROGRAM_TILES_NOISY if noisy else LAST_PROGRAM_TILES) else None


def _shares(x: Tensor, units: int, features: int, pooling: bool) -> tuple[int, int]:
    """Programs that share the features of a sample, and features that each takes."""
    if pooling:
        block_c = power_of_two(features, 16 if units > POOL_UNITS else 1, 64)
        split = units > POOL_UNITS or x.shape[1] * x.shape[2] * x.shape[3] > SPLIT_ABOVE
        per_slice = block_c if split else ceil_div(features, block_c) * block_c
        return ceil_div(features, per_slice), per_slice
    tiles = ceil_div(x.shape[0], DENSE_ROWS) * ceil_div(units, 32)  # about 132 programs in all
    slices = max(1, min(32, ceil_div(features, 512), ceil_div(132, tiles)))
    per_slice = ceil_div(ceil_div(features, slices), 64) * 64
    return ceil_div(features, per_slice), per_slice


def _pool(
    x: Tensor, weight: Tensor, pooled: Tensor, counter: Tensor | None, slices: int, per_slice: int, tail: Any,
    options: dict[str, Any],
) -> None:  # fmt: skip
    x, strides = positions(x)
    units, channels = weight.shape
    pixels = x.shape[2] * x.shape[3]
    block_c = power_of_two(channels, most=64)
    gate_pool_dense[(x.shape[0], slices)](
        pooled, x, *strides, weight, counter, channels, pixels, units, per_slice, *tail, **options,
        TICKET=counter is not None, BLOCK_M=power_of_two(units, 16), BLOCK_C=block_c,
        BLOCK_S=power_of_two(pixels, most=TILE // block_c),
    )  # fmt: skip


def _pool_wide(
    x: Tensor, weight: Tensor, pooled: Tensor, counter: Tensor | None, slices: int, tail: Any, options: dict[str, Any]
) -> None:
    x, strides = positions(x)
    units, channels = weight.shape
    pixels = x.shape[2] * x.shape[3]
    block_c = power_of_two(channels, 16, 64)
    gate_pool_wide[(ceil_div(x.shape[0], DENSE_ROWS), slices)](
        pooled, x, *strides, weight, counter, channels, pixels, units, *tail, **options, TICKET=counter is not None,
        BLOCK_R=DENSE_ROWS, BLOCK_M=32, BLOCK_C=block_c, BLOCK_S=power_of_two(pixels, most=TILE // block_c),
    )  # fmt: skip


def _dense(
    x: Tensor, weight: Tensor, counter: Tensor | None, slices: int, per_slice: int, tail: Any, options: dict[str, Any]
) -> None:
    x, strides, pixels = features_of(x)
    units, features = weight.shape
    block_m = power_of_two(units, 16, 32)
    gate_dense[(ceil_div(x.shape[0], DENSE_ROWS), slices, ceil_div(units, block_m))](
        x, *strides, weight, counter, features, pixels, units, per_slice, *tail, **{**options, "num_stages": 2},
        TICKET=counter is not None, BLOCK_R=DENSE_ROWS, BLOCK_M=block_m, BLOCK_K=64,
    )  # fmt: skip
