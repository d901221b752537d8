"""The last launch of a gate's backward: both gradients of the first dense layer, and those of the norm behind it.

M units of the dense layer, K features; T row tiles, whose sums each program adds up. The rest is in ``gate_backward``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .common import as_map, ceil_div, multiprocessors, norm_terms, power_of_two

# The two numbers below are unmeasured.
PROGRAMS_PER_MULTIPROCESSOR = 2  # of the last launch, at least: two can hide each other's loads
FEW_FEATURES = 1024  # up to which tiles of features are narrower, so that there are enough programs


class HiddenLayer(NamedTuple):
    """The hidden layer before its norm (N, H), and the norm: stat (3, H), gamma (H,), beta (H,)."""

    hidden: Tensor
    stat: Tensor
    gamma: Tensor
    beta: Tensor


class DenseGradients(NamedTuple):
    """Gradients of the first dense layer, weight (M, K), and, with a norm behind it, of bias1, gamma, beta (M,)."""

    weight: Tensor
    bias1: Tensor
    gamma: Tensor
    beta: Tensor


@triton.jit
def sum_of_tiles(sums_ptr, row, m, T, M, BLOCK_M):
    """Add up one row of sums (5, T, M) over T, for units m."""
    BLOCK_T: constexpr = 16
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < T)[:, None] & (m < M)[None, :]
        total += tl.sum(tl.load(sums_ptr + (row * T + t)[:, None] * M + m[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit
def norm_sums(sums_ptr, m, N, M, T, CENTER, BLOCK_M):
    """The shift of da, and the gradients of the norm's bias and weight, for units m."""
    center = tl.zeros((BLOCK_M,), tl.float32)
    d_beta = center
    d_gamma = center
    if sums_ptr is not None:
        d_beta = sum_of_tiles(sums_ptr, 0, m, T, M, BLOCK_M)
        d_gamma = sum_of_tiles(sums_ptr, 1, m, T, M, BLOCK_M)
        if CENTER:
            center = sum_of_tiles(sums_ptr, 2, m, T, M, BLOCK_M) / N
            d_beta -= center * sum_of_tiles(sums_ptr, 3, m, T, M, BLOCK_M)
            d_gamma -= center * sum_of_tiles(sums_ptr, 4, m, T, M, BLOCK_M)
    return center, d_beta, d_gamma


@triton.jit
def dense_gradient(n, m, center, d_beta, d_gamma, dh_ptr, layer, N, M, BATCH_STATS):
    """Gradient at the first dense layer's output, samples n by units m."""
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = n[:, None] * M + m[None, :]
    dh = tl.load(dh_ptr + at, mask=mask, other=0.0)
    if layer is not None:
        mean, rstd, gamma, beta = norm_terms(layer, m, M)
        h = tl.load(layer.hidden + at, mask=mask, other=0.0)
        normed = (h - mean[None, :]) * rstd[None, :]
        dh = tl.where(normed * gamma[None, :] + beta[None, :] <= 0.0, 0.0, dh - center[None, :])
        if BATCH_STATS:
            dh -= (d_beta / N)[None, :] + normed * (d_gamma / N)[None, :]
        dh = tl.where(mask, dh * (gamma * rstd)[None, :], 0.0)
    return dh


@triton.jit
def gate_backward_dense(
    dx,
    out,
    dh_ptr,
    sums_ptr,
    layer,
    x,
    weight_ptr,
    N,
    K,
    HW,
    M,
    T,
    N_PER_GROUP,
    scale,
    BATCH_STATS: constexpr,
    CENTER: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
    BLOCK_K: constexpr,
):
    """Write d weight (M, K) = dh.T @ x (N, K), dx = scale * dh @ weight, and the norm's gradients (M,).

    Grid (K tiles, 1 + groups of samples): the first of a column computes d weight over the whole batch, the others dx
    of their samples; there are none where dx is not needed. dh (N, M) is ``da`` of gate_backward_rows, or dz.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    r = tl.arange(0, BLOCK_N)
    if tl.program_id(1) == 0:
        x_at = (k // HW) * x.stride_c + (k % HW) * x.stride_s
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            in_m = m < M
            center, d_beta, d_gamma = norm_sums(sums_ptr, m, N, M, T, CENTER, BLOCK_M)
            d_weight = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for n0 in range(0, N, BLOCK_N):
                n = n0 + r
                dh = dense_gradient(n, m, center, d_beta, d_gamma, dh_ptr, layer, N, M, BATCH_STATS)
                at = x.ptr + n.to(tl.int64)[:, None] * x.stride_n + x_at[None, :]
                value = tl.load(at, mask=(n < N)[:, None] & in_k[None, :], other=0.0)
                d_weight = tl.dot(tl.trans(dh), value.to(tl.float32), d_weight, input_precision="ieee")
            tl.store(out.weight + m[:, None] * K + k[None, :], d_weight, mask=in_m[:, None] & in_k[None, :])
            if layer is not None:
                if tl.program_id(0) == 0:
                    tl.store(out.beta + m, d_beta, mask=in_m)
                    tl.store(out.gamma + m, d_gamma, mask=in_m)
                    d_bias1 = tl.zeros((BLOCK_M,), tl.float32)  # batch statistics remove a constant: exactly 0
                    if not BATCH_STATS:
                        mean, rstd, gamma, beta = norm_terms(layer, m, M)
                        d_bias1 = gamma * rstd * d_beta
                    tl.store(out.bias1 + m, d_bias1, mask=in_m)
    else:
        dx_at = (k // HW) * dx.stride_c + (k % HW) * dx.stride_s
        begin = (tl.program_id(1) - 1) * N_PER_GROUP
        for n0 in range(begin, tl.minimum(begin + N_PER_GROUP, N), BLOCK_N):
            n = n0 + r
            total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for m0 in range(0, M, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                center, d_beta, d_gamma = norm_sums(sums_ptr, m, N, M, T, CENTER, BLOCK_M)
                dh = dense_gradient(n, m, center, d_beta, d_gamma, dh_ptr, layer, N, M, BATCH_STATS)
                mask = (m < M)[:, None] & in_k[None, :]
                weight = tl.load(weight_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0)
                total = tl.dot(dh, weight, total, input_precision="ieee")
            at = dx.ptr + n.to(tl.int64)[:, None] * dx.stride_n + dx_at[None, :]
            tl.store(at, (total * scale).to(dx.ptr.dtype.element_ty), mask=(n < N)[:, None] & in_k[None, :])


def backward_dense(
    dx: Tensor | None,
    dh: Tensor,
    sums: Tensor | None,
    layer: HiddenLayer | None,
    x: Tensor,
    weight: Tensor,
    scale: float,
    flags: dict[str, bool],
) -> DenseGradients:
    """Fill dx unless it is None; gradients of the first dense layer and of the norm behind it."""
    (units, features), batch = weight.shape, x.shape[0]
    pixels = x.shape[2:].numel()
    out = DenseGradients(
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        *(torch.empty(0 if layer is None else units, device=x.device, dtype=torch.float32) for _ in range(3)),
    )
    block_n, block_k = (32, 16) if features <= FEW_FEATURES else (16, 32)
    blocks: dict[str, Any] = {"BLOCK_N": block_n, "BLOCK_M": power_of_two(units, 16, 32), "BLOCK_K": block_k}
    columns = ceil_div(features, block_k)
    groups = min(ceil_div(batch, block_n), ceil_div(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device), columns))
    per_group = ceil_div(ceil_div(batch, groups), block_n) * block_n
    sizes = (batch, features, pixels, units, 1 if sums is None else sums.shape[1], per_group)
    dx_map = as_map(x if dx is None else dx)
    gate_backward_dense[(columns, 1 if dx is None else 1 + ceil_div(batch, per_group))](
        dx_map, out, dh, sums, layer, as_map(x), weight, *sizes, scale, **blocks, num_stages=2, **flags
    )
    return out
