"""A block's end, out = ReLU(shortcut + factor * BN(x)).

Shapes: x, shortcut, out (N, C, HW) by strides; factor = layer gate (N,) * channel gate (N, C), either may be missing.
BN normalizes by the statistics of the batch and is never stored. Everything between load and store is fp32; sums have
a fixed order.

``statistics`` (one read of x), ``finish_statistics`` (C numbers), ``residual_forward`` (one pass). Between the read and
the pass a channel gate can be decided: what it reads, the pooled BN(x), is an affine function of the pooled x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from . import gate
from .common import (
    FIXED_ORDER,
    as_map,
    ceil_div,
    gradient_like,
    map_at,
    map_tiles,
    move_running,
    multiprocessors,
    norm_terms,
    relu,
)

# Programs of a pass that sums over the batch: 4 of 2048 elements keep 16 KB (fp16) in flight on a multiprocessor, about
# what the latency of a Hopper's memory needs by arithmetic; unmeasured.
PROGRAMS_PER_MULTIPROCESSOR = 4
# Tile of partial sums of the kernels that finish a reduction; unmeasured.
FINISH: dict[str, Any] = {"BLOCK_G": 64, "BLOCK_C": 32, **FIXED_ORDER}


class Norm(NamedTuple):
    """A norm by batch statistics: stat (3, C), mean, 1 / sqrt(var + eps), unbiased variance; gamma, beta (C,)."""

    stat: Tensor
    gamma: Tensor
    beta: Tensor


class ResidualForward(NamedTuple):
    """The results of a forward.

    out (N, C, H, W); pooled_out (N, C), its mean; stat (3, C); pooled (N, C), mean of x; normed (N, C), mean of BN(x),
    and decision, the channel gate's, both None without one.
    """

    out: Tensor
    pooled_out: Tensor
    stat: Tensor
    pooled: Tensor
    normed: Tensor | None
    decision: gate.GateForward | None


@triton.jit
def statistics(part_ptr, pooled_ptr, x, N, C, HW, N_PER_GROUP, BLOCK_C: constexpr, BLOCK_S: constexpr):
    """Write pooled (N, C) = mean of x over HW; part (G, 2, C) = mean, squared deviations of some samples.

    Grid (G, C tiles). Tiles are merged by Chan's formula: no difference of large sums. The mean that is written comes
    from the plain sum, so that an infinite x leaves it infinite, as in PyTorch.
    """
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for i in range(0, tl.minimum(N - group * N_PER_GROUP, N_PER_GROUP)):
        n = group * N_PER_GROUP + i
        total = tl.zeros((BLOCK_C,), tl.float32)
        for s0 in range(0, HW, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            mask = in_c[:, None] & (s < HW)[None, :]
            value = tl.load(map_at(x, n, c, s), mask=mask, other=0.0).to(tl.float32)
            size = tl.minimum(HW - s0, BLOCK_S).to(tl.float32)
            tile_sum = tl.sum(value, 1)
            d = tl.where(mask, value - (tile_sum / size)[:, None], 0.0)
            delta = tile_sum / size - mean
            squares += tl.sum(d * d, 1) + delta * delta * (count * size / (count + size))
            mean += delta * (size / (count + size))
            count += size
            total += tile_sum
        tl.store(pooled_ptr + n * C + c, total / HW, mask=in_c)
        sums += total
    tl.store(part_ptr + (group * 2) * C + c, sums / count, mask=in_c)
    tl.store(part_ptr + (group * 2 + 1) * C + c, squares, mask=in_c)


@triton.jit
def finish_statistics(
    out, part_ptr, pooled_ptr, norm, N, C, HW, G, N_PER_GROUP, UPDATE: constexpr, BLOCK_G: constexpr, BLOCK_C: constexpr
):
    """Write stat (3, C) and normed (N, C), the pooled BN(x), unless that is None. Grid (C tiles,)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for g0 in range(0, G, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        samples = tl.maximum(tl.minimum(N - g * N_PER_GROUP, N_PER_GROUP), 0).to(tl.float32)
        mask = (g < G)[:, None] & in_c[None, :]
        means = tl.load(part_ptr + (g * 2)[:, None] * C + c[None, :], mask=mask, other=0.0)
        mean += tl.sum(means * samples[:, None], 0)
    mean = mean / N
    for g0 in range(0, G, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        samples = tl.maximum(tl.minimum(N - g * N_PER_GROUP, N_PER_GROUP), 0).to(tl.float32)
        mask = (g < G)[:, None] & in_c[None, :]
        means = tl.load(part_ptr + (g * 2)[:, None] * C + c[None, :], mask=mask, other=0.0)
        part = tl.load(part_ptr + (g * 2 + 1)[:, None] * C + c[None, :], mask=mask, other=0.0)
        d = tl.where(mask, means - mean[None, :], 0.0)
        squares += tl.sum(part + d * d * (samples * HW)[:, None], 0)
    count = (N * 1.0) * HW  # an argument of 1 is a plain number in a kernel
    rstd = 1.0 / tl.sqrt(squares / count + norm.eps)
    unbiased = squares / (count - 1.0)
    tl.store(out.stat + c, mean, mask=in_c)
    tl.store(out.stat + C + c, rstd, mask=in_c)
    tl.store(out.stat + 2 * C + c, unbiased, mask=in_c)
    if UPDATE:
        move_running(norm.mean + c, mean, norm.momentum, in_c)
        move_running(norm.var + c, unbiased, norm.momentum, in_c)
        if tl.program_id(0) == 0:
            batches = tl.load(norm.batches)
            tl.debug_barrier()
            tl.store(norm.batches, batches + 1)
    if out.normed is not None:
        scale = tl.load(norm.weight + c, mask=in_c, other=0.0) * rstd
        beta = tl.load(norm.bias + c, mask=in_c, other=0.0)
        for n0 in range(0, N, BLOCK_C):
            n = n0 + tl.arange(0, BLOCK_C)
            rows = (n < N)[:, None] & in_c[None, :]
            pooled = tl.load(pooled_ptr + n[:, None] * C + c[None, :], mask=rows, other=0.0)
            normed = (pooled - mean[None, :]) * scale[None, :] + beta[None, :]
            tl.store(out.normed + n[:, None] * C + c[None, :], normed, mask=rows)


@triton.jit
def gate_factor(layer_ptr, channel_ptr, n, c, C, BLOCK_C):
    """Layer gate * channel gate of sample n; 1 for one that is None."""
    factor = tl.full((BLOCK_C,), 1.0, tl.float32)
    if layer_ptr is not None:
        factor *= tl.load(layer_ptr + n).to(tl.float32)
    if channel_ptr is not None:
        factor *= tl.load(channel_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    return factor


@triton.jit
def residual_forward(
    out, pooled_out_ptr, x, shortcut, norm, layer_ptr, channel_ptr, C, HW, BLOCK_C: constexpr, BLOCK_S: constexpr
):
    """Write out = ReLU(shortcut + factor * BN(x)) and pooled_out (N, C), its mean. Grid (N, C tiles)."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    factor = gate_factor(layer_ptr, channel_ptr, n, c, C, BLOCK_C)
    mean, rstd, gamma, beta = norm_terms(norm, c, C)
    scale = rstd * gamma
    total = tl.zeros((BLOCK_C,), tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = in_c[:, None] & (s < HW)[None, :]
        value = tl.load(map_at(x, n, c, s), mask=mask, other=0.0).to(tl.float32)
        short = tl.load(map_at(shortcut, n, c, s), mask=mask, other=0.0).to(tl.float32)
        branch = (value - mean[:, None]) * scale[:, None] + beta[:, None]
        result = tl.where(mask, relu(short + factor[:, None] * branch), 0.0).to(out.ptr.dtype.element_ty)
        tl.store(map_at(out, n, c, s), result, mask=mask)
        total += tl.sum(result.to(tl.float32), 1)
    tl.store(pooled_out_ptr + n * C + c, total / HW, mask=in_c)


def forward(
    x: Tensor, shortcut: Tensor, layer: Tensor | None, norm: Any, channel: Any | None, *, update: bool
) -> ResidualForward:
    """Compute a block's end; out has the layout of x.

    Args:
        x: (N, C, H, W).
        shortcut: (N, C, H, W).
        layer: (N, 1), or None.
        norm: a tuple as `gatedconv.ops.NormArguments`; its buffers are read only with ``update``.
        channel: a tuple as `gatedconv.ops.InnerGate`, or None.
        update: move the running buffers of the norm and of the channel gate in place.
    """
    new: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    batch, channels, _ = sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
    x_map = as_map(x)
    groups, per_group, tiles, blocks = batch_grid(x_map.ptr)
    part, pooled_out = torch.empty(groups, 2, channels, **new), torch.empty(batch, channels, **new)
    normed = None if channel is None else torch.empty(batch, channels, **new)
    out = gradient_like(x, torch.promote_types(x.dtype, shortcut.dtype))
    kept = ResidualForward(
        out, pooled_out, torch.empty(3, channels, **new), torch.empty(batch, channels, **new), normed, None
    )
    with torch.cuda.device_of(x):
        statistics[(groups, tiles)](part, kept.pooled, x_map, *sizes, per_group, **blocks, **FIXED_ORDER)
        finish_statistics[(ceil_div(channels, FINISH["BLOCK_C"]),)](
            kept, part, kept.pooled, norm, *sizes, groups, per_group, UPDATE=update, **FINISH
        )
        if channel is not None:
            parameters, running, options, noise = channel
            dtype = options.dtype or x.dtype
            update = update and options.training
            decision = gate.forward(normed, parameters, running, options, noise, dtype=dtype, update=update)
            kept = kept._replace(decision=decision)
        residual_forward[(batch, tiles)](
            as_map(out),
            pooled_out,
            x_map,
            as_map(shortcut),
            Norm(kept.stat, norm.weight, norm.bias),
            None if layer is None else layer.contiguous(),
            None if channel is None else decision.gate,
            *sizes[1:],
            **blocks,
            **FIXED_ORDER,
        )
    return kept


def batch_grid(x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """The grid of a pass that sums over the batch: groups of samples, samples of a group, channel tiles, tile sizes."""
    tiles, blocks = map_tiles(x)
    per_group = ceil_div(x.shape[0], ceil_div(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device), tiles))
    return ceil_div(x.shape[0], per_group), per_group, tiles, blocks
