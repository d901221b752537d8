"""The backward of a block's end; shapes, number formats and the order of sums as in ``gated_residual``.

``residual_reduce`` (one read of x, out and the gradient), ``finish_reduce``, ``residual_backward`` (one pass). Between
the read and the pass comes the channel gate's own backward: the gradient of what it reads is a constant per sample and
channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from . import gate_backward
from .common import FIXED_ORDER, as_map, ceil_div, gradient_like, map_at, norm_terms, power_of_two
from .gated_residual import FINISH, Norm, ResidualForward, batch_grid, gate_factor


class Incoming(NamedTuple):
    """Inputs of both backward passes in addition to the maps: the gradient of out's mean, the norm and the gates.

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


@triton.jit
def sum_gradient(d_out, pooled_share, out, n, c, s, mask):
    """Gradient at the sum inside the ReLU: of out, and of its pooled mean, where out is positive."""
    grad = tl.zeros(mask.shape, tl.float32) + pooled_share[:, None]
    if d_out is not None:
        grad += tl.load(map_at(d_out, n, c, s), mask=mask, other=0.0).to(tl.float32)
    value = tl.load(map_at(out, n, c, s), mask=mask, other=0.0).to(tl.float32)
    return tl.where(value <= 0.0, 0.0, grad)  # NaN passes, as in PyTorch


@triton.jit
def pooled_gradient(d_pooled_ptr, n, c, C, HW, BLOCK_C):
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
    mean, rstd, gamma, beta = norm_terms(given.norm, c, C)
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
    mean, rstd, gamma, _ = norm_terms(given.norm, c, C)
    scale = gamma * rstd
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
    groups, per_group, tiles, blocks = batch_grid(x_map.ptr)
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
    with torch.cuda.device_of(x):
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
