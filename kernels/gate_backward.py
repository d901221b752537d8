"""Backward kernels of a gate; shapes, number formats and the order of sums as in ``gate``.

Two launches: ``gate_backward_tail`` (``gate_backward_logits`` where there is no hidden layer, and before it
where the threshold is the batch mean of the logits), then ``gate_backward_dense``.
"""

import triton
import triton.language as tl

from .gate import slope


@triton.jit
def logit_gradient(
    d_gate_ptr,
    d_rate_ptr,
    d_logits_ptr,
    logits_ptr,
    noise_ptr,
    threshold_ptr,
    rows,
    o,
    mask,
    N,
    O,
    temperature,
    HAS_GATE: tl.constexpr,
    HAS_RATE: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
):
    """Gradient of the logits: through gate (N, O), through open rate (O,), and their own."""
    at = rows[:, None] * O + o[None, :]
    in_o = o < O
    result = tl.zeros(mask.shape, tl.float32)
    if HAS_GATE:
        result += tl.load(d_gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RATE:
        result += tl.load(d_rate_ptr + o, mask=in_o, other=0.0)[None, :] / N
    if HAS_GATE or HAS_RATE:
        z = tl.load(logits_ptr + at, mask=mask, other=0.0)
        u = z
        if NOISY:
            u = tl.load(noise_ptr + at, mask=mask, other=0.5)
        threshold = tl.load(threshold_ptr + o, mask=in_o, other=0.0)
        result = result * slope(z, u, threshold[None, :], temperature, ESTIMATOR, NOISY)
    if HAS_LOGITS:
        result += tl.load(d_logits_ptr + at, mask=mask, other=0.0)
    return tl.where(mask, result, 0.0)


@triton.jit
def gate_backward_logits(
    dz_ptr,
    d_bias2_ptr,
    d_gate_ptr,
    d_rate_ptr,
    d_logits_ptr,
    logits_ptr,
    noise_ptr,
    threshold_ptr,
    N,
    O,
    temperature,
    CENTRE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RATE: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Write dz (N, O) and d bias2 (O,); CENTRE: the threshold was their batch mean. Grid (O tiles,)."""
    r = tl.arange(0, BLOCK_N)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    mean = tl.zeros((BLOCK_O,), tl.float32)
    if CENTRE:
        for start in range(0, N, BLOCK_N):
            mask = (start + r < N)[:, None] & (o < O)[None, :]
            dz = logit_gradient(
                d_gate_ptr,
                d_rate_ptr,
                d_logits_ptr,
                logits_ptr,
                noise_ptr,
                threshold_ptr,
                start + r,
                o,
                mask,
                N,
                O,
                temperature,
                HAS_GATE,
                HAS_RATE,
                False,
                ESTIMATOR,
                NOISY,
            )
            mean += tl.sum(dz, 0)
        mean = mean / N
    d_bias = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + r
        mask = (rows < N)[:, None] & (o < O)[None, :]
        dz = logit_gradient(
            d_gate_ptr,
            d_rate_ptr,
            d_logits_ptr,
            logits_ptr,
            noise_ptr,
            threshold_ptr,
            rows,
            o,
            mask,
            N,
            O,
            temperature,
            HAS_GATE,
            HAS_RATE,
            HAS_LOGITS,
            ESTIMATOR,
            NOISY,
        )
        dz = tl.where(mask, dz - mean[None, :], 0.0)
        tl.store(dz_ptr + rows[:, None] * O + o[None, :], dz, mask=mask)
        d_bias += tl.sum(dz, 0)
    tl.store(d_bias2_ptr + o, d_bias, mask=o < O)


@triton.jit
def hidden_gradient(
    rows,
    j,
    in_n,
    in_h,
    o_tiles,
    hidden_ptr,
    weight2_ptr,
    mean,
    rstd,
    gamma,
    beta,
    d_gate_ptr,
    d_rate_ptr,
    d_logits_ptr,
    logits_ptr,
    noise_ptr,
    threshold_ptr,
    N,
    H,
    O,
    temperature,
    HAS_GATE: tl.constexpr,
    HAS_RATE: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """For some rows: the normed hidden layer, and the gradient at the norm's output (past the ReLU)."""
    mask_h = in_n[:, None] & in_h[None, :]
    da = tl.zeros(mask_h.shape, tl.float32)
    for tile in range(0, o_tiles):
        o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        dz = logit_gradient(
            d_gate_ptr,
            d_rate_ptr,
            d_logits_ptr,
            logits_ptr,
            noise_ptr,
            threshold_ptr,
            rows,
            o,
            in_n[:, None] & (o < O)[None, :],
            N,
            O,
            temperature,
            HAS_GATE,
            HAS_RATE,
            HAS_LOGITS,
            ESTIMATOR,
            NOISY,
        )
        weight2 = tl.load(
            weight2_ptr + o[:, None] * H + j[None, :], mask=(o < O)[:, None] & in_h[None, :], other=0.0
        )
        da = tl.dot(dz, weight2, da, input_precision="ieee")
    h = tl.load(hidden_ptr + rows[:, None] * H + j[None, :], mask=mask_h, other=0.0)
    normed = tl.where(mask_h, (h - mean[None, :]) * rstd[None, :], 0.0)
    return normed, tl.where(normed * gamma[None, :] + beta[None, :] > 0.0, da, 0.0)


@triton.jit
def gate_backward_tail(
    dh_ptr,
    d_weight2_ptr,
    d_bias2_ptr,
    d_gamma_ptr,
    d_beta_ptr,
    d_bias1_ptr,
    hidden_ptr,
    stat_ptr,
    gamma_ptr,
    beta_ptr,
    weight2_ptr,
    d_gate_ptr,
    d_rate_ptr,
    d_logits_ptr,
    logits_ptr,
    noise_ptr,
    threshold_ptr,
    N,
    H,
    O,
    temperature,
    BATCH_STATS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RATE: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Write dh (N, H) and the gradients of second dense layer and norm; grid (most of N tiles, O tiles).

    Every program sums the norm's two batch means for itself; then program i writes row tile i of dh and tile
    i of the second layer's gradients.
    """
    i = tl.program_id(0)
    r = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    in_h = j < H
    o_tiles = tl.cdiv(O, BLOCK_O)
    mean = tl.load(stat_ptr + j, mask=in_h, other=0.0)
    rstd = tl.load(stat_ptr + H + j, mask=in_h, other=0.0)
    gamma = tl.load(gamma_ptr + j, mask=in_h, other=0.0)
    beta = tl.load(beta_ptr + j, mask=in_h, other=0.0)
    d_gamma = tl.zeros((BLOCK_H,), tl.float32)
    d_beta = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, N, BLOCK_N):
        normed, dy = hidden_gradient(
            start + r,
            j,
            start + r < N,
            in_h,
            o_tiles,
            hidden_ptr,
            weight2_ptr,
            mean,
            rstd,
            gamma,
            beta,
            d_gate_ptr,
            d_rate_ptr,
            d_logits_ptr,
            logits_ptr,
            noise_ptr,
            threshold_ptr,
            N,
            H,
            O,
            temperature,
            HAS_GATE,
            HAS_RATE,
            HAS_LOGITS,
            ESTIMATOR,
            NOISY,
            BLOCK_O,
        )
        d_gamma += tl.sum(dy * normed, 0)
        d_beta += tl.sum(dy, 0)
    if i == 0:
        tl.store(d_gamma_ptr + j, d_gamma, mask=in_h)
        tl.store(d_beta_ptr + j, d_beta, mask=in_h)
        if BATCH_STATS:  # the norm removes a constant, so its gradient is exactly 0
            tl.store(d_bias1_ptr + j, tl.zeros((BLOCK_H,), tl.float32), mask=in_h)
        else:
            tl.store(d_bias1_ptr + j, gamma * rstd * d_beta, mask=in_h)
    rows = i * BLOCK_N + r
    if i * BLOCK_N < N:
        normed, dh = hidden_gradient(
            rows,
            j,
            rows < N,
            in_h,
            o_tiles,
            hidden_ptr,
            weight2_ptr,
            mean,
            rstd,
            gamma,
            beta,
            d_gate_ptr,
            d_rate_ptr,
            d_logits_ptr,
            logits_ptr,
            noise_ptr,
            threshold_ptr,
            N,
            H,
            O,
            temperature,
            HAS_GATE,
            HAS_RATE,
            HAS_LOGITS,
            ESTIMATOR,
            NOISY,
            BLOCK_O,
        )
        if BATCH_STATS:
            dh = dh - (d_beta / N)[None, :] - normed * (d_gamma / N)[None, :]
        dh = dh * (gamma * rstd)[None, :]
        tl.store(dh_ptr + rows[:, None] * H + j[None, :], dh, mask=(rows < N)[:, None] & in_h[None, :])
    o = i * BLOCK_O + tl.arange(0, BLOCK_O)
    if i < o_tiles:
        d_weight2 = tl.zeros((BLOCK_O, BLOCK_H), tl.float32)
        d_bias2 = tl.zeros((BLOCK_O,), tl.float32)
        for start in range(0, N, BLOCK_N):
            mask_h = (start + r < N)[:, None] & in_h[None, :]
            dz = logit_gradient(
                d_gate_ptr,
                d_rate_ptr,
                d_logits_ptr,
                logits_ptr,
                noise_ptr,
                threshold_ptr,
                start + r,
                o,
                (start + r < N)[:, None] & (o < O)[None, :],
                N,
                O,
                temperature,
                HAS_GATE,
                HAS_RATE,
                HAS_LOGITS,
                ESTIMATOR,
                NOISY,
            )
            h = tl.load(hidden_ptr + (start + r)[:, None] * H + j[None, :], mask=mask_h, other=0.0)
            a = tl.maximum((h - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :], 0.0)
            d_weight2 = tl.dot(tl.trans(dz), tl.where(mask_h, a, 0.0), d_weight2, input_precision="ieee")
            d_bias2 += tl.sum(dz, 0)
        tl.store(
            d_weight2_ptr + o[:, None] * H + j[None, :], d_weight2, mask=(o < O)[:, None] & in_h[None, :]
        )
        tl.store(d_bias2_ptr + o, d_bias2, mask=o < O)


@triton.jit
def gate_backward_dense(
    dx_ptr,
    dx_stride_n,
    dx_stride_c,
    dx_stride_s,
    d_weight_ptr,
    dh_ptr,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    weight_ptr,
    N,
    K,
    HW,
    M,
    scale,
    NEED_DX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write d weight (M, K) = dh (N, M).T @ x (N, K) and dx = scale * dh @ weight.

    A program owns BLOCK_K features: grid (K tiles,).
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    r = tl.arange(0, BLOCK_N)
    x_at = (k // HW) * x_stride_c + (k % HW) * x_stride_s
    dx_at = (k // HW) * dx_stride_c + (k % HW) * dx_stride_s
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + r
            dh = tl.load(
                dh_ptr + n[None, :] * M + m[:, None], mask=(n < N)[None, :] & (m < M)[:, None], other=0.0
            )
            at = x_ptr + n.to(tl.int64)[:, None] * x_stride_n + x_at[None, :]
            x = tl.load(at, mask=(n < N)[:, None] & in_k[None, :], other=0.0)
            total = tl.dot(dh, x.to(tl.float32), total, input_precision="ieee")
        tl.store(d_weight_ptr + m[:, None] * K + k[None, :], total, mask=(m < M)[:, None] & in_k[None, :])
    if NEED_DX:
        for n0 in range(0, N, BLOCK_N):
            n = n0 + r
            dx = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for m0 in range(0, M, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                dh = tl.load(
                    dh_ptr + n[:, None] * M + m[None, :], mask=(n < N)[:, None] & (m < M)[None, :], other=0.0
                )
                weight = tl.load(
                    weight_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & in_k[None, :], other=0.0
                )
                dx = tl.dot(dh, weight, dx, input_precision="ieee")
            at = dx_ptr + n.to(tl.int64)[:, None] * dx_stride_n + dx_at[None, :]
            tl.store(at, (dx * scale).to(dx_ptr.dtype.element_ty), mask=(n < N)[:, None] & in_k[None, :])
