"""Kernels of a block's end, out = ReLU(shortcut + factor * BN(x)), and of the way back.

Shapes: x, shortcut, out (N, C, HW) by strides; factor = layer gate (N,) * channel gate (N, C), either may be
missing. BN normalises by the statistics of the batch. Everything between load and store is fp32; sums have a
fixed order.

Forward: ``statistics`` (one read of x), ``finish_statistics`` (C numbers), ``residual_forward`` (one pass).
Backward: ``residual_reduce`` (one read of x, out and the gradient), ``finish_reduce``, ``residual_backward``
(one pass). Between a read and its pass a channel gate can be decided, or be gone back through: what it reads,
the pooled BN(x), is an affine function of the pooled x, and its gradient a constant per sample and channel.
BN(x) itself is never stored.
"""

import triton
import triton.language as tl


@triton.jit
def statistics(
    part_ptr,
    pooled_ptr,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    N,
    C,
    HW,
    N_PER_GROUP,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write pooled (N, C) = mean of x over HW; part (G, 2, C) = mean, squared deviations of some samples.

    Grid (G, C tiles). Tiles are merged by Chan's formula: no difference of large sums.
    """
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for i in range(0, tl.minimum(N - group * N_PER_GROUP, N_PER_GROUP)):
        n = group * N_PER_GROUP + i
        base = x_ptr + n.to(tl.int64) * x_stride_n
        total = tl.zeros((BLOCK_C,), tl.float32)
        for s0 in range(0, HW, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            mask = in_c[:, None] & (s < HW)[None, :]
            x = tl.load(base + c[:, None] * x_stride_c + s[None, :] * x_stride_s, mask=mask, other=0.0).to(
                tl.float32
            )
            size = tl.minimum(HW - s0, BLOCK_S).to(tl.float32)
            tile_sum = tl.sum(x, 1)
            d = tl.where(mask, x - (tile_sum / size)[:, None], 0.0)
            delta = tile_sum / size - mean
            squares += tl.sum(d * d, 1) + delta * delta * (count * size / (count + size))
            mean += delta * (size / (count + size))
            count += size
            total += tile_sum
        tl.store(pooled_ptr + n * C + c, total / HW, mask=in_c)
    tl.store(part_ptr + (group * 2) * C + c, mean, mask=in_c)
    tl.store(part_ptr + (group * 2 + 1) * C + c, squares, mask=in_c)


@triton.jit
def finish_statistics(
    stat_ptr,
    normed_ptr,
    part_ptr,
    pooled_ptr,
    gamma_ptr,
    beta_ptr,
    run_mean_ptr,
    run_var_ptr,
    run_count_ptr,
    N,
    C,
    HW,
    G,
    N_PER_GROUP,
    eps,
    momentum,
    NORMED: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write stat (2, C) = mean, 1 / sqrt(var + eps); normed (N, C) = pooled BN(x). Grid (C tiles,)."""
    g = tl.arange(0, BLOCK_G)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = (g < G)[:, None] & in_c[None, :]
    means = tl.load(part_ptr + (g * 2)[:, None] * C + c[None, :], mask=mask, other=0.0)
    squares = tl.load(part_ptr + (g * 2 + 1)[:, None] * C + c[None, :], mask=mask, other=0.0)
    samples = tl.maximum(tl.minimum(N - g * N_PER_GROUP, N_PER_GROUP), 0).to(tl.float32)
    mean = tl.sum(means * samples[:, None], 0) / N
    d = means - mean[None, :]
    count = (N * 1.0) * HW  # an argument of 1 is a plain number in a kernel
    var_sum = tl.sum(squares + tl.where(mask, d * d, 0.0) * (samples * HW)[:, None], 0)
    rstd = 1.0 / tl.sqrt(var_sum / count + eps)
    tl.store(stat_ptr + c, mean, mask=in_c)
    tl.store(stat_ptr + C + c, rstd, mask=in_c)
    if UPDATE:
        old = tl.load(run_mean_ptr + c, mask=in_c)
        tl.store(run_mean_ptr + c, old + momentum * (mean - old), mask=in_c)
        old = tl.load(run_var_ptr + c, mask=in_c)
        tl.store(run_var_ptr + c, old + momentum * (var_sum / (count - 1.0) - old), mask=in_c)
        if tl.program_id(0) == 0:
            tl.store(run_count_ptr, tl.load(run_count_ptr) + 1)
    if NORMED:
        scale = tl.load(gamma_ptr + c, mask=in_c, other=0.0) * rstd
        beta = tl.load(beta_ptr + c, mask=in_c, other=0.0)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            rows = (n < N)[:, None] & in_c[None, :]
            pooled = tl.load(pooled_ptr + n[:, None] * C + c[None, :], mask=rows, other=0.0)
            tl.store(
                normed_ptr + n[:, None] * C + c[None, :],
                (pooled - mean[None, :]) * scale[None, :] + beta[None, :],
                mask=rows,
            )


@triton.jit
def residual_forward(
    out_ptr,
    out_stride_n,
    out_stride_c,
    out_stride_s,
    pooled_out_ptr,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    shortcut_ptr,
    shortcut_stride_n,
    shortcut_stride_c,
    shortcut_stride_s,
    stat_ptr,
    gamma_ptr,
    beta_ptr,
    layer_ptr,
    channel_ptr,
    C,
    HW,
    HAS_LAYER: tl.constexpr,
    HAS_CHANNEL: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write out = ReLU(shortcut + factor * BN(x)) and pooled_out (N, C), its mean. Grid (N, C tiles)."""
    n = tl.program_id(0)
    row = n.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    factor = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_LAYER:
        factor *= tl.load(layer_ptr + n).to(tl.float32)
    if HAS_CHANNEL:
        factor *= tl.load(channel_ptr + n * C + c, mask=in_c, other=0.0).to(tl.float32)
    mean = tl.load(stat_ptr + c, mask=in_c, other=0.0)
    scale = tl.load(stat_ptr + C + c, mask=in_c, other=0.0) * tl.load(gamma_ptr + c, mask=in_c, other=0.0)
    beta = tl.load(beta_ptr + c, mask=in_c, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = in_c[:, None] & (s < HW)[None, :]
        x_at = x_ptr + row * x_stride_n + c[:, None] * x_stride_c + s[None, :] * x_stride_s
        short_at = (
            shortcut_ptr
            + row * shortcut_stride_n
            + c[:, None] * shortcut_stride_c
            + s[None, :] * shortcut_stride_s
        )
        x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        shortcut = tl.load(short_at, mask=mask, other=0.0).to(tl.float32)
        branch = (x - mean[:, None]) * scale[:, None] + beta[:, None]
        out = tl.where(mask, tl.maximum(shortcut + factor[:, None] * branch, 0.0), 0.0)
        out = out.to(out_ptr.dtype.element_ty)
        out_at = out_ptr + row * out_stride_n + c[:, None] * out_stride_c + s[None, :] * out_stride_s
        tl.store(out_at, out, mask=mask)
        if POOL:
            total += tl.sum(out.to(tl.float32), 1)
    if POOL:
        tl.store(pooled_out_ptr + n * C + c, total / HW, mask=in_c)


@triton.jit
def sum_gradient(at_grad, at_out, d_pooled, mask, HW, HAS_GRAD: tl.constexpr, HAS_POOLED: tl.constexpr):
    """Gradient at the sum inside the ReLU: of out, and of its pooled mean, where out is positive."""
    grad = tl.zeros(mask.shape, tl.float32)
    if HAS_GRAD:
        grad += tl.load(at_grad, mask=mask, other=0.0).to(tl.float32)
    if HAS_POOLED:
        grad += d_pooled[:, None] / HW
    out = tl.load(at_out, mask=mask, other=0.0).to(tl.float32)
    return tl.where(out > 0.0, grad, 0.0)


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
