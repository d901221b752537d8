"""The last backward kernel of a gate: through its first dense layer, and the norm behind that, to the features.

Shapes as in ``gate_rows`` and ``gate_backward``: N samples, K features, M units, T row tiles of ``sums``.
"""

import triton
import triton.language as tl


@triton.jit
def sum_of_tiles(sums_ptr, row, m, in_m, T, M, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Add up one row of sums (5, T, M) over T, for some units."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < T)[:, None] & in_m[None, :]
        total += tl.sum(tl.load(sums_ptr + (row * T + t)[:, None] * M + m[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit
def norm_sums(
    sums_ptr, m, in_m, N, M, T, HIDDEN: tl.constexpr, CENTRE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For some units: what to subtract from da, and the gradients of the norm's bias and weight."""
    centre = tl.zeros((BLOCK_M,), tl.float32)
    d_beta = centre
    d_gamma = centre
    if HIDDEN:
        d_beta = sum_of_tiles(sums_ptr, 0, m, in_m, T, M, BLOCK_T, BLOCK_M)
        d_gamma = sum_of_tiles(sums_ptr, 1, m, in_m, T, M, BLOCK_T, BLOCK_M)
        if CENTRE:
            centre = sum_of_tiles(sums_ptr, 2, m, in_m, T, M, BLOCK_T, BLOCK_M) / N
            d_beta -= centre * sum_of_tiles(sums_ptr, 3, m, in_m, T, M, BLOCK_T, BLOCK_M)
            d_gamma -= centre * sum_of_tiles(sums_ptr, 4, m, in_m, T, M, BLOCK_T, BLOCK_M)
    return centre, d_beta, d_gamma


@triton.jit
def dense_gradient(
    n, m, in_n, in_m, centre, d_beta, d_gamma, dh_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr, N, M,
    HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr,
):  # fmt: skip
    """Gradient at the first dense layer's output, samples n by units m."""
    mask = in_n[:, None] & in_m[None, :]
    at = n[:, None] * M + m[None, :]
    dh = tl.load(dh_ptr + at, mask=mask, other=0.0)
    if HIDDEN:
        mean = tl.load(stat_ptr + m, mask=in_m, other=0.0)
        rstd = tl.load(stat_ptr + M + m, mask=in_m, other=0.0)
        gamma = tl.load(gamma_ptr + m, mask=in_m, other=0.0)
        beta = tl.load(beta_ptr + m, mask=in_m, other=0.0)
        h = tl.load(hidden_ptr + at, mask=mask, other=0.0)
        normed = (h - mean[None, :]) * rstd[None, :]
        dh = tl.where(normed * gamma[None, :] + beta[None, :] <= 0.0, 0.0, dh - centre[None, :])
        if BATCH_STATS:
            dh -= (d_beta / N)[None, :] + normed * (d_gamma / N)[None, :]
        dh = tl.where(mask, dh * (gamma * rstd)[None, :], 0.0)
    return dh


@triton.jit
def gate_backward_dense(
    dx_ptr, dx_stride_n, dx_stride_c, dx_stride_s, d_weight_ptr, d_bias1_ptr, d_gamma_ptr, d_beta_ptr, dh_ptr,
    sums_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr, x_ptr, x_stride_n, x_stride_c, x_stride_s, weight_ptr,
    N, K, HW, M, T, N_PER_GROUP, scale, HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr, CENTRE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write d weight (M, K) = dh.T @ x (N, K), dx = scale * dh @ weight, and the norm's gradients (M,).

    Grid (K tiles, 1 + groups of samples): the first of a column does d weight over the whole batch, the others dx
    of their samples; there are none where dx is not wanted. dh (N, M) is ``da`` of gate_backward_rows, or dz.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    r = tl.arange(0, BLOCK_N)
    if tl.program_id(1) == 0:
        x_at = (k // HW) * x_stride_c + (k % HW) * x_stride_s
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            in_m = m < M
            centre, d_beta, d_gamma = norm_sums(sums_ptr, m, in_m, N, M, T, HIDDEN, CENTRE, BLOCK_T, BLOCK_M)
            total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for n0 in range(0, N, BLOCK_N):
                n = n0 + r
                dh = dense_gradient(
                    n, m, n < N, in_m, centre, d_beta, d_gamma, dh_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr,
                    N, M, HIDDEN, BATCH_STATS,
                )  # fmt: skip
                at = x_ptr + n.to(tl.int64)[:, None] * x_stride_n + x_at[None, :]
                x = tl.load(at, mask=(n < N)[:, None] & in_k[None, :], other=0.0)
                total = tl.dot(tl.trans(dh), x.to(tl.float32), total, input_precision="ieee")
            tl.store(d_weight_ptr + m[:, None] * K + k[None, :], total, mask=in_m[:, None] & in_k[None, :])
            if HIDDEN:
                if tl.program_id(0) == 0:
                    tl.store(d_beta_ptr + m, d_beta, mask=in_m)
                    tl.store(d_gamma_ptr + m, d_gamma, mask=in_m)
                    if BATCH_STATS:  # the norm removes a constant, so its gradient is exactly 0
                        tl.store(d_bias1_ptr + m, tl.zeros((BLOCK_M,), tl.float32), mask=in_m)
                    else:
                        gamma = tl.load(gamma_ptr + m, mask=in_m, other=0.0)
                        rstd = tl.load(stat_ptr + M + m, mask=in_m, other=0.0)
                        tl.store(d_bias1_ptr + m, gamma * rstd * d_beta, mask=in_m)
    else:
        dx_at = (k // HW) * dx_stride_c + (k % HW) * dx_stride_s
        begin = (tl.program_id(1) - 1) * N_PER_GROUP
        for n0 in range(begin, tl.minimum(begin + N_PER_GROUP, N), BLOCK_N):
            n = n0 + r
            dx = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for m0 in range(0, M, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                in_m = m < M
                centre, d_beta, d_gamma = norm_sums(sums_ptr, m, in_m, N, M, T, HIDDEN, CENTRE, BLOCK_T, BLOCK_M)
                dh = dense_gradient(
                    n, m, n < N, in_m, centre, d_beta, d_gamma, dh_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr,
                    N, M, HIDDEN, BATCH_STATS,
                )  # fmt: skip
                weight = tl.load(
                    weight_ptr + m[:, None] * K + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0
                )
                dx = tl.dot(dh, weight, dx, input_precision="ieee")
            at = dx_ptr + n.to(tl.int64)[:, None] * dx_stride_n + dx_at[None, :]
            tl.store(at, (dx * scale).to(dx_ptr.dtype.element_ty), mask=(n < N)[:, None] & in_k[None, :])
