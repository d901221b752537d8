"""A block's end, out = ReLU(shortcut + factor * BN(x)), forward and backward.

Shapes: x, shortcut, out (N, C, HW) by strides; factor = layer gate (N,) * channel gate (N, C), either may be missing.
BN normalizes by the statistics of the batch and is never stored. Everything between load and store is fp32; sums have
a fixed order.

Forward: ``statistics`` (one read of x), ``finish_statistics`` (C numbers), ``residual_forward`` (one pass). Between the
read and the pass a channel gate can be decided: what it reads, the pooled BN(x), is an affine function of the pooled x.
Backward: ``residual_reduce`` (one read of x, out and the gradient), ``finish_reduce``, ``residual_backward`` (one
pass). Between the read and the pass comes the channel gate's own backward: the gradient of what it reads is a constant
per sample and channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from . import gate, gate_backward
from .common import (
    FIXED_ORDER,
    as_map,
    ceil_div,
    gradient_like,
    map_at,
    map_tiles,
    multiprocessors,
    on_device,
    power_of_two,
    relu,
)

# Of a pass that sums over the batch: 4 programs of 2048 elements keep 16 KB (fp16) in flight on a multiprocessor, about
# what the latency of a Hopper's memory needs by arithmetic; unmeasured.
PROGRAMS_PER_MULTIPROCESSOR = 4
# Tile of partial sums of the kernels that finish a reduction; unmeasured.
FINISH: dict[str, Any] = {"BLOCK_G": 64, "BLOCK_C": 32, **FIXED_ORDER}


class Norm(NamedTuple):
    """A norm by batch statistics: stat (3, C), mean, 1 / sqrt(var + eps), unbiased variance; gamma, beta (C,)."""

    stat: Tensor
    gamma: Tensor
    beta: Tensor


class Incoming(NamedTuple):
    """What both passes of the backward read beside maps: the gradient of out's mean, and what ``out`` was made of.

    Maps stay outside: Triton 3.6 turns a stride of 1 in a nested tuple into None.
    """

    d_pooled: Tensor | None
    norm: Norm
    layer: Tensor | None
    channel: Tensor | None


class Parts(NamedTuple):
    """Sums left to be finished: norm (G, 2, C) over groups of samples; layer (N, T) over channel tiles, or None."""

    norm: Tensor
    layer: Tensor | None


class Finished(NamedTuple):
    """Gradients of the norm, beta and gamma (C,), and of the layer gate (N, 1), None without one."""

    beta: Tensor
    gamma: Tensor
    layer: Tensor | None


class ResidualForward(NamedTuple):
    """What a forward computes.

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
        gate.move(norm.mean + c, mean, norm.momentum, in_c)
        gate.move(norm.var + c, unbiased, norm.momentum, in_c)
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
def gate_factor(layer_ptr, channel_ptr, n, c, C, BLOCK_C: constexpr):
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
    mean = tl.load(norm.stat + c, mask=in_c, other=0.0)
    scale = tl.load(norm.stat + C + c, mask=in_c, other=0.0) * tl.load(norm.gamma + c, mask=in_c, other=0.0)
    beta = tl.load(norm.beta + c, mask=in_c, other=0.0)
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


@triton.jit
def sum_gradient(d_out, pooled_share, out, n, c, s, mask):
    """Gradient at the sum inside the ReLU: of out, and of its pooled mean, where out is positive."""
    grad = tl.zeros(mask.shape, tl.float32) + pooled_share[:, None]
    if d_out is not None:
        grad += tl.load(map_at(d_out, n, c, s), mask=mask, other=0.0).to(tl.float32)
    value = tl.load(map_at(out, n, c, s), mask=mask, other=0.0).to(tl.float32)
    return tl.where(value <= 0.0, 0.0, grad)  # NaN passes, as in PyTorch


@triton.jit
def pooled_gradient(d_pooled_ptr, n, c, C, HW, BLOCK_C: constexpr):
    """The gradient of the pooled out at one position; 0 if it is None."""
    share = tl.zeros((BLOCK_C,), tl.float32)
    if d_pooled_ptr is not None:
        share = tl.load(d_pooled_ptr + n * C + c, mask=c < C, other=0.0) / HW
    return share


@triton.jit
def residual_reduce(
    part, d_channel_ptr, d_out, out, x, given, N, C, HW, N_PER_GROUP, BLOCK_C: constexpr, BLOCK_S: constexpr
):
    """Gradients of the gates, and part.norm (G, 2, C) = sums of dy and of dy * normed x, dy the gradient of BN(x).

    part.layer (N, C tiles) is left to be summed; d_channel (N, C). Grid (G, C tiles).
    """
    group = tl.program_id(0)
    tile = tl.program_id(1)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.load(given.norm.stat + c, mask=in_c, other=0.0)
    rstd = tl.load(given.norm.stat + C + c, mask=in_c, other=0.0)
    gamma = tl.load(given.norm.gamma + c, mask=in_c, other=0.0)
    beta = tl.load(given.norm.beta + c, mask=in_c, other=0.0)
    sum_dy = tl.zeros((BLOCK_C,), tl.float32)
    sum_dyx = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(0, tl.minimum(N - group * N_PER_GROUP, N_PER_GROUP)):
        n = group * N_PER_GROUP + i
        share = pooled_gradient(given.d_pooled, n, c, C, HW, BLOCK_C)
        plain = tl.zeros((BLOCK_C,), tl.float32)
        normed = tl.zeros((BLOCK_C,), tl.float32)
        for s0 in range(0, HW, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            mask = in_c[:, None] & (s < HW)[None, :]
            grad = sum_gradient(d_out, share, out, n, c, s, mask)
            value = tl.load(map_at(x, n, c, s), mask=mask, other=0.0).to(tl.float32)
            plain += tl.sum(grad, 1)
            normed += tl.sum(grad * ((value - mean[:, None]) * rstd[:, None]), 1)
        branch = gamma * normed + beta * plain
        if given.channel is not None:
            tl.store(d_channel_ptr + n * C + c, branch * gate_factor(given.layer, None, n, c, C, BLOCK_C), mask=in_c)
        if given.layer is not None:
            d_layer = tl.sum(branch * gate_factor(None, given.channel, n, c, C, BLOCK_C), 0)
            tl.store(part.layer + n * tl.num_programs(1) + tile, d_layer)
        factor = gate_factor(given.layer, given.channel, n, c, C, BLOCK_C)
        sum_dy += factor * plain
        sum_dyx += factor * normed
    tl.store(part.norm + (group * 2) * C + c, sum_dy, mask=in_c)
    tl.store(part.norm + (group * 2 + 1) * C + c, sum_dyx, mask=in_c)


@triton.jit
def finish_reduce(
    out, part, d_normed_ptr, pooled_ptr, norm, N, C, G, T, BLOCK_G: constexpr, BLOCK_C: constexpr, BLOCK_T: constexpr
):
    """Write the gradients of the norm, the two sums that BN's backward needs, and of the layer gate from (N, T).

    d_normed (N, C) or None is the gradient of the pooled BN(x). Grid (C tiles,).
    """
    if out.layer is not None:
        if tl.program_id(0) == 0:
            t = tl.arange(0, BLOCK_T)
            for n0 in range(0, N, BLOCK_C):
                n = n0 + tl.arange(0, BLOCK_C)
                mask = (n < N)[:, None] & (t < T)[None, :]
                parts = tl.load(part.layer + n[:, None] * T + t[None, :], mask=mask, other=0.0)
                tl.store(out.layer + n, tl.sum(parts, 1).to(out.layer.dtype.element_ty), mask=n < N)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    d_beta = tl.zeros((BLOCK_C,), tl.float32)
    d_gamma = tl.zeros((BLOCK_C,), tl.float32)
    for g0 in range(0, G, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        mask = (g < G)[:, None] & in_c[None, :]
        d_beta += tl.sum(tl.load(part.norm + (g * 2)[:, None] * C + c[None, :], mask=mask, other=0.0), 0)
        d_gamma += tl.sum(tl.load(part.norm + (g * 2 + 1)[:, None] * C + c[None, :], mask=mask, other=0.0), 0)
    if d_normed_ptr is not None:
        mean = tl.load(norm.stat + c, mask=in_c, other=0.0)
        rstd = tl.load(norm.stat + C + c, mask=in_c, other=0.0)
        for n0 in range(0, N, BLOCK_C):
            n = n0 + tl.arange(0, BLOCK_C)
            rows = (n < N)[:, None] & in_c[None, :]
            d_normed = tl.load(d_normed_ptr + n[:, None] * C + c[None, :], mask=rows, other=0.0)
            pooled = tl.load(pooled_ptr + n[:, None] * C + c[None, :], mask=rows, other=0.0)
            d_beta += tl.sum(d_normed, 0)
            d_gamma += tl.sum(d_normed * (pooled - mean[None, :]) * rstd[None, :], 0)
    tl.store(out.beta + c, d_beta, mask=in_c)
    tl.store(out.gamma + c, d_gamma, mask=in_c)


@triton.jit
def residual_backward(
    dx, d_shortcut, d_out, out, x, given, sums, d_normed_ptr, N, C, HW, BLOCK_C: constexpr, BLOCK_S: constexpr
):
    """Write dx through factor and BN, and d_shortcut unless it is None. Grid (N, C tiles)."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    count = (N * 1.0) * HW  # an argument of 1 is a plain number in a kernel
    factor = gate_factor(given.layer, given.channel, n, c, C, BLOCK_C)
    share = pooled_gradient(given.d_pooled, n, c, C, HW, BLOCK_C)
    mean = tl.load(given.norm.stat + c, mask=in_c, other=0.0)
    rstd = tl.load(given.norm.stat + C + c, mask=in_c, other=0.0)
    scale = tl.load(given.norm.gamma + c, mask=in_c, other=0.0) * rstd
    mean_dyx = tl.load(sums.gamma + c, mask=in_c, other=0.0) / count
    shift = -tl.load(sums.beta + c, mask=in_c, other=0.0) / count
    if d_normed_ptr is not None:
        shift += tl.load(d_normed_ptr + n * C + c, mask=in_c, other=0.0) / HW
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = in_c[:, None] & (s < HW)[None, :]
        grad = sum_gradient(d_out, share, out, n, c, s, mask)
        value = tl.load(map_at(x, n, c, s), mask=mask, other=0.0).to(tl.float32)
        normed = (value - mean[:, None]) * rstd[:, None]
        result = scale[:, None] * (factor[:, None] * grad + shift[:, None] - normed * mean_dyx[:, None])
        tl.store(map_at(dx, n, c, s), result.to(dx.ptr.dtype.element_ty), mask=mask)
        if d_shortcut is not None:
            tl.store(map_at(d_shortcut, n, c, s), grad.to(d_shortcut.ptr.dtype.element_ty), mask=mask)


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
    groups, per_group, tiles, blocks = _grid(x_map.ptr)
    part, pooled_out = torch.empty(groups, 2, channels, **new), torch.empty(batch, channels, **new)
    normed = None if channel is None else torch.empty(batch, channels, **new)
    out = gradient_like(x, torch.promote_types(x.dtype, shortcut.dtype))
    kept = ResidualForward(
        out, pooled_out, torch.empty(3, channels, **new), torch.empty(batch, channels, **new), normed, None
    )
    with on_device(x):
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


def backward(
    d_out: Tensor | None,
    d_pooled: Tensor | None,
    d_decision: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    saved: ResidualForward,
    layer: Tensor | None,
    norm: Any,
    channel: Any | None,
    *,
    shortcut_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, shortcut, layer, norm weight, norm bias, and of the gate's six parameters; None for no gate.

    Args:
        d_out: gradient of out, or None.
        d_pooled: gradient of pooled_out, or None.
        d_decision: gradients of the channel gate's open rate and logits.
        x: as in the forward, like ``layer``, ``norm`` and ``channel``.
        saved: what the forward computed.
        layer: as in the forward.
        norm: as in the forward; its buffers are not read.
        channel: as in the forward.
        shortcut_dtype: of the shortcut's gradient; None if it is not needed.
    """
    new: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    batch, channels, _ = sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
    x_map, layer = as_map(x), None if layer is None else layer.contiguous()
    groups, per_group, tiles, blocks = _grid(x_map.ptr)
    affine = Norm(saved.stat, norm.weight, norm.bias)
    maps = None if d_out is None else as_map(d_out), as_map(saved.out), x_map
    given = Incoming(
        None if d_pooled is None else d_pooled.contiguous(),
        affine,
        layer,
        None if saved.decision is None else saved.decision.gate,
    )
    part = Parts(torch.empty(groups, 2, channels, **new), None if layer is None else torch.empty(batch, tiles, **new))
    d_channel = None if channel is None else torch.empty(batch, channels, **new)
    with on_device(x):
        residual_reduce[(groups, tiles)](part, d_channel, *maps, given, *sizes, per_group, **blocks, **FIXED_ORDER)
        d_normed, d_parameters = None, (None,) * 6
        if channel is not None:
            parameters, _, options, noise = channel
            d = gate_backward.GateGradients(d_channel, *d_decision)
            d_normed, *d_parameters = gate_backward.backward(
                d, saved.normed, saved.decision, parameters, options, noise, need_dx=True
            )
        dx = gradient_like(x, x.dtype)
        d_shortcut = None if shortcut_dtype is None else gradient_like(saved.out, shortcut_dtype)
        d_layer = None if layer is None else torch.empty_like(layer)
        sums = Finished(torch.empty_like(norm.weight), torch.empty_like(norm.weight), d_layer)
        last = {"BLOCK_T": power_of_two(tiles), **FINISH}
        finish_reduce[(ceil_div(channels, FINISH["BLOCK_C"]),)](
            sums, part, d_normed, saved.pooled, affine, batch, channels, groups, tiles, **last
        )
        d_short = None if d_shortcut is None else as_map(d_shortcut)
        residual_backward[(batch, tiles)](as_map(dx), d_short, *maps, given, sums, d_normed, *sizes, **blocks)
    return dx, d_shortcut, d_layer, sums.gamma, sums.beta, *d_parameters


def _grid(x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """For passes that sum over the batch: groups of samples, samples of a group, channel tiles, and tile sizes."""
    tiles, blocks = map_tiles(x)
    per_group = ceil_div(x.shape[0], ceil_div(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x), tiles))
    return ceil_div(x.shape[0], per_group), per_group, tiles, blocks
