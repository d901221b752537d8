"""Launches the gate kernels: tile sizes, grids, and the buffers that they fill."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gate import gate_dense, gate_pool_dense, gate_tail
from .gate_backward import gate_backward_dense, gate_backward_logits, gate_backward_tail
from .launch import TILE, ceil_div, on_device, positions, power_of_two

DENSE_ROWS = 16
SPLIT_ABOVE = 1 << 16  # elements of a sample above which its channels are shared out to several programs
ONE_LAUNCH_GATES = 16  # one tile; above, one program's tail takes longer than a second launch
POOL_UNITS = 64  # units of the first layer above which pooling and the layer part: the weight tile spills
ONE_LAUNCH_SAMPLES = 1024

_tickets: dict[tuple[int | None, int], Tensor] = {}


class GateForward(NamedTuple):
    """What a forward computes; all fp32 but ``gate``.

    gate (N, O); rate (O,); logits (N, O); pooled (N, C), empty if nothing was pooled; hidden (N, H); stat (3,
    H): batch mean, 1 / sqrt(var + eps), unbiased variance (batch statistics only); threshold (O,).
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
    temperature: float,
    train: bool,
    batch_stats: bool,
    update: bool,
    flatten: bool,
    eps: float,
    norm_momentum: float,
    momentum: float,
    dtype: torch.dtype,
    one_launch: bool | None = None,
) -> GateForward:
    """Decide for x (N, C, H, W), pooled unless ``flatten``, or for features x (N, K).

    ``one_launch`` None picks one launch where nothing is being captured: a captured graph may run on any
    stream, and the counter that one launch needs belongs to a stream.
    """
    batch, gates = x.shape[0], weight2.shape[0]
    first = weight2 if weight1 is None else weight1
    hidden = 0 if weight1 is None else weight1.shape[0]
    pooling = x.dim() == 4 and not flatten
    if one_launch is None:
        one_launch = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    units = first.shape[0]
    one_launch = (
        one_launch
        and pooling
        and gates <= ONE_LAUNCH_GATES
        and units <= POOL_UNITS
        and batch <= ONE_LAUNCH_SAMPLES
    )
    if pooling:
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        block_c = power_of_two(channels, most=64)
        per_slice = block_c if channels * pixels > SPLIT_ABOVE else ceil_div(channels, block_c) * block_c
        slices = ceil_div(channels, per_slice)
    else:
        slices, per_slice = _slices(batch, first.shape[1], units)
    new = {"device": x.device, "dtype": torch.float32}
    pooled = torch.empty((batch, x.shape[1]) if pooling else (0,), **new)
    out = GateForward(
        torch.empty(batch, gates, device=x.device, dtype=dtype),
        torch.empty(gates, **new),
        torch.empty(batch, gates, **new),
        pooled,
        torch.empty(batch, hidden, **new),
        torch.empty(3, hidden, **new),
        torch.empty(gates, **new),
    )
    part = torch.empty(slices, batch, units, **new)
    tail = (
        bias1,
        norm_weight,
        norm_bias,
        weight2,
        bias2,
        noise,
        running.mean,
        running.var,
        running.batches,
        running.rate,
        running.threshold,
        batch,
        slices,
        hidden,
        gates,
        eps,
        temperature,
        norm_momentum,
        momentum,
    )
    options = {
        "HIDDEN": weight1 is not None,
        "BATCH_STATS": batch_stats,
        "UPDATE": update,
        "TRAIN": train,
        "ESTIMATOR": estimator,
        "NOISY": noise is not None,
        **_tail_tiles(hidden),
    }
    results = (out.gate, out.rate, out.logits, out.hidden, out.stat, out.threshold)
    with on_device(x):
        if pooling:
            fused = units <= POOL_UNITS
            x, strides = positions(x)
            gate_pool_dense[(batch, slices)](
                pooled,
                part,
                x,
                *strides,
                first,
                _ticket(x) if one_launch else None,
                channels,
                pixels,
                units if fused else 0,
                per_slice,
                *results,
                *tail,
                **options,
                TICKET=one_launch,
                BLOCK_M=power_of_two(units, 16) if fused else 16,
                BLOCK_C=block_c,
                BLOCK_S=power_of_two(pixels, most=TILE // block_c),
            )
            if not fused:
                part = part[:1]
                tail = (*tail[:12], 1, *tail[13:])
                _dense(part, pooled, first, 1, power_of_two(channels, 64))
        else:
            _dense(part, x, first, slices, per_slice)
        if not one_launch:
            gate_tail[(ceil_div(gates, 16),)](*results, part, *tail, **options)
    return out


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
    ``dtype``: it is the same for all of them.
    """
    batch, gates = saved.logits.shape
    hidden = saved.hidden.shape[1]
    new = {"device": features.device, "dtype": torch.float32}
    d_gate, d_rate, d_logits = (None if d is None else d.contiguous() for d in (d_gate, d_rate, d_logits))
    flags = {
        "HAS_GATE": d_gate is not None,
        "HAS_RATE": d_rate is not None,
        "HAS_LOGITS": d_logits is not None,
        "ESTIMATOR": estimator,
        "NOISY": noise is not None,
    }
    first = weight2 if weight1 is None else weight1
    d_first, d_bias2 = (
        torch.empty_like(first, memory_format=torch.contiguous_format),
        torch.empty(gates, **new),
    )
    d_bias1, d_gamma, d_beta = (torch.empty(hidden, **new) for _ in range(3))
    d_second = torch.empty(gates, hidden, **new)
    dh = torch.empty(batch, hidden, **new)
    if features.dim() == 4:
        features = positions(features)[0]  # evenly spaced, and so is a fresh tensor like it
    dx = torch.empty_like(features, dtype=dtype)
    with on_device(features):
        centre = estimator == "batch_mean" and train
        if weight1 is None or centre:
            dz = torch.empty(batch, gates, **new)
            gate_backward_logits[(ceil_div(gates, 16),)](
                dz,
                d_bias2,
                d_gate,
                d_rate,
                d_logits,
                saved.logits,
                noise,
                saved.threshold,
                batch,
                gates,
                temperature,
                CENTRE=centre,
                **flags,
                BLOCK_N=64,
                BLOCK_O=16,
            )
            d_gate, d_rate, d_logits = None, None, dz
            flags.update(HAS_GATE=False, HAS_RATE=False, HAS_LOGITS=True)
            dh = dz if weight1 is None else dh
        if weight1 is not None:
            tiles = _tail_tiles(hidden)
            gate_backward_tail[(max(ceil_div(batch, tiles["BLOCK_N"]), ceil_div(gates, tiles["BLOCK_O"])),)](
                dh,
                d_second,
                d_bias2,
                d_gamma,
                d_beta,
                d_bias1,
                saved.hidden,
                saved.stat,
                norm_weight,
                norm_bias,
                weight2,
                d_gate,
                d_rate,
                d_logits,
                saved.logits,
                noise,
                saved.threshold,
                batch,
                hidden,
                gates,
                temperature,
                BATCH_STATS=batch_stats,
                **flags,
                **tiles,
            )
        _dense_backward(dx, d_first, dh, features, first, 1 / pixels, need_dx)
    if weight1 is None:
        return dx, d_second, d_bias1, d_gamma, d_beta, d_first, d_bias2
    return dx, d_first, d_bias1, d_gamma, d_beta, d_second, d_bias2


def _tail_tiles(hidden: int) -> dict[str, int]:
    """Tiles of a tail: 1024 numbers of the hidden layer at a time; loops too short to pipeline."""
    block_h = power_of_two(hidden, 16)
    return {"BLOCK_N": max(16, 1024 // block_h), "BLOCK_H": block_h, "BLOCK_O": 16, "num_stages": 1}


def _features(x: Tensor) -> tuple[Tensor, tuple[int, int, int], int]:
    """Features or a map to flatten: tensor, strides (sample, channel, position), positions a channel."""
    if x.dim() == 2:
        return x, (x.stride(0), x.stride(1), 0), 1
    x, strides = positions(x)
    return x, strides, x.shape[2] * x.shape[3]


def _slices(batch: int, features: int, units: int) -> tuple[int, int]:
    """Programs that share the features of a row, and features that each takes: about 132 programs in all."""
    tiles = ceil_div(batch, DENSE_ROWS) * ceil_div(units, 32)
    slices = max(1, min(32, ceil_div(features, 512), ceil_div(132, tiles)))
    per_slice = ceil_div(ceil_div(features, slices), 64) * 64
    return ceil_div(features, per_slice), per_slice


def _dense(part: Tensor, x: Tensor, weight: Tensor, slices: int, per_slice: int) -> None:
    x, strides, pixels = _features(x)
    units, features = weight.shape
    block_m = power_of_two(units, 16, 32)
    gate_dense[(ceil_div(x.shape[0], DENSE_ROWS), slices, ceil_div(units, block_m))](
        part,
        x,
        *strides,
        weight,
        x.shape[0],
        features,
        pixels,
        units,
        per_slice,
        BLOCK_N=DENSE_ROWS,
        BLOCK_M=block_m,
        BLOCK_K=64,
        num_stages=2,
    )


def _dense_backward(
    dx: Tensor, d_weight: Tensor, dh: Tensor, x: Tensor, weight: Tensor, scale: float, need_dx: bool
) -> None:
    x, strides, pixels = _features(x)
    units, features = weight.shape
    dx_strides = _features(dx)[1]
    block_k = 16 if features <= 1024 else 32  # few features: smaller tiles, so that more programs share them
    gate_backward_dense[(ceil_div(features, block_k),)](
        dx,
        *dx_strides,
        d_weight,
        dh,
        x,
        *strides,
        weight,
        x.shape[0],
        features,
        pixels,
        units,
        scale,
        NEED_DX=need_dx,
        BLOCK_N=16,
        BLOCK_M=power_of_two(units, 16, 32),
        BLOCK_K=block_k,
        num_stages=2,
    )


def _ticket(x: Tensor) -> Tensor:
    """The counter of the current stream; a kernel leaves it at 0, so kernels of one stream can share it."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    key = (x.device.index, stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, device=x.device, dtype=torch.int32)
    return _tickets[key]
