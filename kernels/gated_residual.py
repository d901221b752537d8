"""Kernels of a block's end, out = ReLU(shortcut + factor * BN(x)); the way back is in ``gated_residual_backward``.

Shapes: x, shortcut, out (N, C, HW) by strides; factor = layer gate (N,) * channel gate (N, C), either may be
missing. BN normalises by the statistics of the batch. Everything between load and store is fp32; sums have a
fixed order.

``statistics`` (one read of x), ``finish_statistics`` (C numbers), ``residual_forward`` (one pass). Between the read and
the pass a channel gate can be decided: what it reads, the pooled BN(x), is an affine function of the pooled x. BN(x)
itself is never stored.
"""

import triton
import triton.language as tl

from .gate_tail import relu


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
        sums += total
    tl.store(part_ptr + (group * 2) * C + c, sums / count, mask=in_c)
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
    """Write stat (3, C) = mean, 1 / sqrt(var + eps), unbiased variance; normed (N, C) = pooled BN(x).

    Grid (C tiles,).
    """
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
    unbiased = var_sum / (count - 1.0)
    tl.store(stat_ptr + 2 * C + c, unbiased, mask=in_c)
    if UPDATE:
        old = tl.load(run_mean_ptr + c, mask=in_c)
        tl.store(run_mean_ptr + c, old + momentum * (mean - old), mask=in_c)
        old = tl.load(run_var_ptr + c, mask=in_c)
        tl.store(run_var_ptr + c, old + momentum * (unbiased - old), mask=in_c)
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
        out = tl.where(mask, relu(shortcut + factor[:, None] * branch), 0.0)
        out = out.to(out_ptr.dtype.element_ty)
        out_at = out_ptr + row * out_stride_n + c[:, None] * out_stride_c + s[None, :] * out_stride_s
        tl.store(out_at, out, mask=mask)
        if POOL:
            total += tl.sum(out.to(tl.float32), 1)
    if POOL:
        tl.store(pooled_out_ptr + n * C + c, total / HW, mask=in_c)
