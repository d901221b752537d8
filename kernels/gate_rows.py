"""The beginning of a gate's forward: features -> first dense layer, spread over samples and features.

Shapes: N samples, C channels, HW positions of a map, K features (C pooled, or C*HW flattened), M units of the first
dense layer, S slices that the features are split into. Input of any floating dtype, everything after the load fp32
without tensor cores: rounded products would move logits across their threshold.

Each kernel writes part (S, N, M), slices of features @ weight.T; with TICKET its last program runs the tail.
"""

import triton
import triton.language as tl

from .gate_tail import finish


@triton.jit
def channel_sums(base, c, in_c, stride_c, stride_s, HW, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sums over the positions of some channels of a sample."""
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        at = base + c[:, None] * stride_c + s[None, :] * stride_s
        x = tl.load(at, mask=in_c[:, None] & (s < HW)[None, :], other=0.0)
        sums += tl.sum(x.to(tl.float32), 1)
    return sums


@triton.jit
def gate_pool_dense(
    pooled_ptr, x_ptr, x_stride_n, x_stride_c, x_stride_s, weight_ptr, ticket_ptr, C, HW, M, C_PER_SLICE,
    gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr, beta_ptr,
    weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, run_rate_ptr, run_threshold_ptr,
    N, S, H, O, eps, norm_momentum, momentum, HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr, UPDATE: tl.constexpr,
    TRAIN: tl.constexpr, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr, TICKET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write pooled (N, C), the mean of x over HW, and part, slices of pooled @ weight (M, C).T. Grid (N, S)."""
    n = tl.program_id(0)
    split = tl.program_id(1)
    base = x_ptr + n.to(tl.int64) * x_stride_n  # 2^31 elements are in reach of a batch, not of a sample
    m = tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, C_PER_SLICE, BLOCK_C):
        c = split * C_PER_SLICE + start + tl.arange(0, BLOCK_C)
        in_c = c < C
        pooled = channel_sums(base, c, in_c, x_stride_c, x_stride_s, HW, BLOCK_C, BLOCK_S) / HW
        tl.store(pooled_ptr + n * C + c, pooled, mask=in_c)
        weight = tl.load(weight_ptr + m[:, None] * C + c[None, :], mask=(m < M)[:, None] & in_c[None, :], other=0.0)
        product += tl.sum(weight * pooled[None, :], 1)
    tl.store(part_ptr + (split * N + n) * M + m, product, mask=m < M)
    if TICKET:
        finish(
            ticket_ptr, N * S, gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr,
            bias1_ptr, gamma_ptr, beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr,
            run_count_ptr, run_rate_ptr, run_threshold_ptr, N, S, H, O, eps, norm_momentum, momentum, HIDDEN,
            BATCH_STATS, UPDATE, TRAIN, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip


@triton.jit
def gate_pool_wide(
    pooled_ptr, x_ptr, x_stride_n, x_stride_c, x_stride_s, weight_ptr, ticket_ptr, C, HW, M,
    gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr, beta_ptr,
    weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, run_rate_ptr, run_threshold_ptr,
    N, S, H, O, eps, norm_momentum, momentum, HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr, UPDATE: tl.constexpr,
    TRAIN: tl.constexpr, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr, TICKET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """As gate_pool_dense for many units: a weight is read once for BLOCK_R samples. Grid (N tiles, S = C tiles)."""
    r = tl.arange(0, BLOCK_R)
    rows = tl.program_id(0) * BLOCK_R + r
    split = tl.program_id(1)
    c = split * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    pooled = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(0, tl.minimum(N - tl.program_id(0) * BLOCK_R, BLOCK_R)):
        n = tl.program_id(0) * BLOCK_R + i
        base = x_ptr + n.to(tl.int64) * x_stride_n
        mean = channel_sums(base, c, in_c, x_stride_c, x_stride_s, HW, BLOCK_C, BLOCK_S) / HW
        tl.store(pooled_ptr + n * C + c, mean, mask=in_c)
        pooled = tl.where((r == i)[:, None], mean[None, :], pooled)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        weight = tl.load(weight_ptr + m[None, :] * C + c[:, None], mask=(m < M)[None, :] & in_c[:, None], other=0.0)
        product = tl.dot(pooled, weight, input_precision="ieee")
        at = part_ptr + (split * N + rows)[:, None] * M + m[None, :]
        tl.store(at, product, mask=(rows < N)[:, None] & (m < M)[None, :])
    if TICKET:
        finish(
            ticket_ptr, tl.num_programs(0) * tl.num_programs(1), gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr,
            threshold_ptr, part_ptr, bias1_ptr, gamma_ptr, beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr,
            run_var_ptr, run_count_ptr, run_rate_ptr, run_threshold_ptr, N, S, H, O, eps, norm_momentum, momentum,
            HIDDEN, BATCH_STATS, UPDATE, TRAIN, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip


@triton.jit
def gate_dense(
    x_ptr, x_stride_n, x_stride_c, x_stride_s, weight_ptr, ticket_ptr, K, HW, M, K_PER_SLICE,
    gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr, beta_ptr,
    weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, run_rate_ptr, run_threshold_ptr,
    N, S, H, O, eps, norm_momentum, momentum, HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr, UPDATE: tl.constexpr,
    TRAIN: tl.constexpr, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr, TICKET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write part, slices of x (N, K) @ weight (M, K).T; feature k is (k // HW, k % HW). Grid (N, S, M tiles)."""
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = x_ptr + n.to(tl.int64)[:, None] * x_stride_n
    total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, K_PER_SLICE, BLOCK_K):
        k = split * K_PER_SLICE + start + tl.arange(0, BLOCK_K)
        at = (k // HW) * x_stride_c + (k % HW) * x_stride_s
        x = tl.load(rows + at[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(weight_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(x.to(tl.float32), weight, total, input_precision="ieee")
    at = part_ptr + (split * N + n)[:, None] * M + m[None, :]
    tl.store(at, total, mask=(n < N)[:, None] & (m < M)[None, :])
    if TICKET:
        finish(
            ticket_ptr, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2), gate_ptr, rate_ptr, logits_ptr,
            hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr, beta_ptr, weight2_ptr, bias2_ptr,
            noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, run_rate_ptr, run_threshold_ptr, N, S, H, O, eps,
            norm_momentum, momentum, HIDDEN, BATCH_STATS, UPDATE, TRAIN, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip
