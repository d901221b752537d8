"""Kernels of the way back through a block's end; shapes and number formats as in ``gated_residual``.

``residual_reduce`` (one read of x, out and the gradient), ``finish_reduce``, ``residual_backward`` (one pass). Between
the read and the pass a channel gate can be gone back through: the gradient of what it reads, the pooled BN(x), is a
constant per sample and channel.
"""

import triton
import triton.language as tl


@triton.jit
def sum_gradient(at_grad, at_out, d_pooled, mask, HW, HAS_GRAD: tl.constexpr, HAS_POOLED: tl.constexpr):
    """Gradient at the sum inside the ReLU: of out, and of its pooled mean, where out is positive."""
    grad = tl.zeros(mask.shape, tl.float32)
    if HAS_GRAD:
        grad += tl.load(at_grad, mask=mask, other=0.0).to(tl.float32)
    if HAS_POOLED:
        grad += d_pooled[:, None] / HW
    out = tl.load(at_out, mask=mask, other=0.0).to(tl.float32)
    return tl.where(out <= 0.0, 0.0, grad)  # NaN passes, as in PyTorch


@triton.jit
def residual_reduce(
    part_ptr,
    layer_part_ptr,
    d_channel_ptr,
    d_out_ptr,
    d_out_stride_n,
    d_out_stride_c,
    d_out_stride_s,
    d_pooled_ptr,
    out_ptr,
    out_stride_n,
    out_stride_c,
    out_stride_s,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    stat_ptr,
    gamma_ptr,
    beta_ptr,
    layer_ptr,
    channel_ptr,
    N,
    C,
    HW,
    N_PER_GROUP,
    HAS_GRAD: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    HAS_LAYER: tl.constexpr,
    HAS_CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gradients of the gates, and part (G, 2, C) = sums of dy and of dy * normed x, dy the gradient of BN(x).

    layer_part (N, C tiles) is left to be summed; d_channel (N, C). Grid (G, C tiles).
    """
    group = tl.program_id(0)
    tile = tl.program_id(1)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.load(stat_ptr + c, mask=in_c, other=0.0)
    rstd = tl.load(stat_ptr + C + c, mask=in_c, other=0.0)
    gamma = tl.load(gamma_ptr + c, mask=in_c, other=0.0)
    beta = tl.load(beta_ptr + c, mask=in_c, other=0.0)
    sum_dy = tl.zeros((BLOCK_C,), tl.float32)
    sum_dyx = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(0, tl.minimum(N - group * N_PER_GROUP, N_PER_GROUP)):
        n = group * N_PER_GROUP + i
        row = n.to(tl.int64)
        d_pooled = tl.zeros((BLOCK_C,), tl.float32)
        if HAS_POOLED:
            d_pooled = tl.load(d_pooled_ptr + n * C + c, mask=in_c, other=0.0)
        plain = tl.zeros((BLOCK_C,), tl.float32)
        normed = tl.zeros((BLOCK_C,), tl.float32)
        for s0 in range(0, HW, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            mask = in_c[:, None] & (s < HW)[None, :]
            grad_at = d_out_ptr
            if HAS_GRAD:
                grad_at = (
                    d_out_ptr
                    + row * d_out_stride_n
                    + c[:, None] * d_out_stride_c
                    + s[None, :] * d_out_stride_s
                )
            out_at = out_ptr + row * out_stride_n + c[:, None] * out_stride_c + s[None, :] * out_stride_s
            x_at = x_ptr + row * x_stride_n + c[:, None] * x_stride_c + s[None, :] * x_stride_s
            grad = sum_gradient(grad_at, out_at, d_pooled, mask, HW, HAS_GRAD, HAS_POOLED)
            x = (tl.load(x_at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
            plain += tl.sum(grad, 1)
            normed += tl.sum(grad * x, 1)
        factor = tl.full((BLOCK_C,), 1.0, tl.float32)
        branch = gamma * normed + beta * plain
        if HAS_LAYER:
            layer = tl.load(layer_ptr + n).to(tl.float32)
            factor *= layer
        if HAS_CHANNEL:
            channel = tl.load(channel_ptr + n * C + c, mask=in_c, other=0.0).to(tl.float32)
            tl.store(d_channel_ptr + n * C + c, branch * factor, mask=in_c)
            branch *= channel
            factor *= channel
        if HAS_LAYER:
            tl.store(layer_part_ptr + n * tl.num_programs(1) + tile, tl.sum(branch, 0))
        sum_dy += factor * plain
        sum_dyx += factor * normed
    tl.store(part_ptr + (group * 2) * C + c, sum_dy, mask=in_c)
    tl.store(part_ptr + (group * 2 + 1) * C + c, sum_dyx, mask=in_c)


@triton.jit
def finish_reduce(
    d_beta_ptr,
    d_gamma_ptr,
    d_layer_ptr,
    part_ptr,
    layer_part_ptr,
    d_normed_ptr,
    pooled_ptr,
    stat_ptr,
    N,
    C,
    G,
    T,
    HAS_LAYER: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write d beta and d gamma (C,), the two sums that BN's backward needs, and d_layer (N,) from (N, T).

    HAS_NORMED: with the gradient d_normed (N, C) of the pooled BN(x). Grid (C tiles,).
    """
    if HAS_LAYER and tl.program_id(0) == 0:
        t = tl.arange(0, BLOCK_T)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            mask = (n < N)[:, None] & (t < T)[None, :]
            parts = tl.load(layer_part_ptr + n[:, None] * T + t[None, :], mask=mask, other=0.0)
            tl.store(d_layer_ptr + n, tl.sum(parts, 1).to(d_layer_ptr.dtype.element_ty), mask=n < N)
    g = tl.arange(0, BLOCK_G)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = (g < G)[:, None] & in_c[None, :]
    d_beta = tl.sum(tl.load(part_ptr + (g * 2)[:, None] * C + c[None, :], mask=mask, other=0.0), 0)
    d_gamma = tl.sum(tl.load(part_ptr + (g * 2 + 1)[:, None] * C + c[None, :], mask=mask, other=0.0), 0)
    if HAS_NORMED:
        mean = tl.load(stat_ptr + c, mask=in_c, other=0.0)
        rstd = tl.load(stat_ptr + C + c, mask=in_c, other=0.0)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            rows = (n < N)[:, None] & in_c[None, :]
            d_normed = tl.load(d_normed_ptr + n[:, None] * C + c[None, :], mask=rows, other=0.0)
            pooled = tl.load(pooled_ptr + n[:, None] * C + c[None, :], mask=rows, other=0.0)
            d_beta += tl.sum(d_normed, 0)
            d_gamma += tl.sum(d_normed * (pooled - mean[None, :]) * rstd[None, :], 0)
    tl.store(d_beta_ptr + c, d_beta, mask=in_c)
    tl.store(d_gamma_ptr + c, d_gamma, mask=in_c)


@triton.jit
def residual_backward(
    dx_ptr,
    dx_stride_n,
    dx_stride_c,
    dx_stride_s,
    d_shortcut_ptr,
    d_shortcut_stride_n,
    d_shortcut_stride_c,
    d_shortcut_stride_s,
    d_out_ptr,
    d_out_stride_n,
    d_out_stride_c,
    d_out_stride_s,
    d_pooled_ptr,
    out_ptr,
    out_stride_n,
    out_stride_c,
    out_stride_s,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    stat_ptr,
    gamma_ptr,
    layer_ptr,
    channel_ptr,
    d_beta_ptr,
    d_gamma_ptr,
    d_normed_ptr,
    N,
    C,
    HW,
    HAS_GRAD: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    HAS_LAYER: tl.constexpr,
    HAS_CHANNEL: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    NEED_SHORTCUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write dx through factor and BN, and d_shortcut. Grid (N, C tiles)."""
    n = tl.program_id(0)
    row = n.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    count = (N * 1.0) * HW  # an argument of 1 is a plain number in a kernel
    factor = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_LAYER:
        factor *= tl.load(layer_ptr + n).to(tl.float32)
    if HAS_CHANNEL:
        factor *= tl.load(channel_ptr + n * C + c, mask=in_c, other=0.0).to(tl.float32)
    d_pooled = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_POOLED:
        d_pooled = tl.load(d_pooled_ptr + n * C + c, mask=in_c, other=0.0)
    mean = tl.load(stat_ptr + c, mask=in_c, other=0.0)
    rstd = tl.load(stat_ptr + C + c, mask=in_c, other=0.0)
    scale = tl.load(gamma_ptr + c, mask=in_c, other=0.0) * rstd
    mean_dyx = tl.load(d_gamma_ptr + c, mask=in_c, other=0.0) / count
    shift = -tl.load(d_beta_ptr + c, mask=in_c, other=0.0) / count
    if HAS_NORMED:
        shift += tl.load(d_normed_ptr + n * C + c, mask=in_c, other=0.0) / HW
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = in_c[:, None] & (s < HW)[None, :]
        grad_at = d_out_ptr
        if HAS_GRAD:
            grad_at = (
                d_out_ptr + row * d_out_stride_n + c[:, None] * d_out_stride_c + s[None, :] * d_out_stride_s
            )
        out_at = out_ptr + row * out_stride_n + c[:, None] * out_stride_c + s[None, :] * out_stride_s
        x_at = x_ptr + row * x_stride_n + c[:, None] * x_stride_c + s[None, :] * x_stride_s
        grad = sum_gradient(grad_at, out_at, d_pooled, mask, HW, HAS_GRAD, HAS_POOLED)
        x = (tl.load(x_at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dx = scale[:, None] * (factor[:, None] * grad + shift[:, None] - x * mean_dyx[:, None])
        dx_at = dx_ptr + row * dx_stride_n + c[:, None] * dx_stride_c + s[None, :] * dx_stride_s
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_SHORTCUT:
            at = (
                d_shortcut_ptr
                + row * d_shortcut_stride_n
                + c[:, None] * d_shortcut_stride_c
                + s[None, :] * d_shortcut_stride_s
            )
            tl.store(at, grad.to(d_shortcut_ptr.dtype.element_ty), mask=mask)
