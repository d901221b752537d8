"""Forward kernels of a gate: features -> dense -> BatchNorm over the batch -> ReLU -> dense -> 0/1 decision.

Shapes: N samples, C channels, HW positions of a map, K features (C pooled, or C*HW flattened), H hidden
units, O gates, S slices that the features are split into. Parameters, logits and every sum are fp32; features
and gates may be half precision. All sums have a fixed order: there is no atomic on a float, so results repeat
bit for bit.

Forward in two launches: a row pass (``gate_pool_dense`` or ``gate_dense``) writes each sample's share of the
first dense layer, ``gate_tail`` does the rest. A program of the tail that needs statistics over the batch
recomputes them from the N * H numbers of the hidden layer, which is cheaper than a barrier over the grid.
Where there is one program of tail to run, the last program of the row pass can run it in the same launch
(``TICKET``).

Backward in two launches, in ``gate_backward``: ``gate_backward_tail`` down to the gradient of the first dense
layer's output, ``gate_backward_dense`` from there to its weight and to the features.
"""

import triton
import triton.language as tl


@triton.jit
def decide(z, u, threshold, temperature, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr):
    """Whether a gate opens: logits z, uniform noise u on (0, 1), threshold of the batch-mean estimator."""
    if ESTIMATOR == "bernoulli" and NOISY:
        opens = u < tl.sigmoid(z)
    elif ESTIMATOR == "gumbel" and NOISY:
        opens = z + tl.log(u) - tl.log(1.0 - u) > 0.0
    elif ESTIMATOR == "batch_mean":
        opens = z - threshold > 0.0
    else:
        opens = z > 0.0
    return opens


@triton.jit
def slope(z, u, threshold, temperature, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr):
    """Derivative of gate by logit of the estimator."""
    if ESTIMATOR == "bernoulli":
        p = tl.sigmoid(z)
        result = p * (1.0 - p)
    elif ESTIMATOR == "gumbel":
        if NOISY:
            z = z + tl.log(u) - tl.log(1.0 - u)
        s = tl.sigmoid(z / temperature)
        result = s * (1.0 - s) / temperature
    elif ESTIMATOR == "batch_mean":
        result = tl.where(tl.abs(z - threshold) <= 1.0, 1.0, 0.0)  # eq. 4, ends included
    else:
        result = tl.where(tl.abs(z) <= 1.0, 1.0, 0.0)
    return result


@triton.jit
def sum_of_slices(part_ptr, rows, columns, mask, N, S, M):
    """Rows and columns of sum_s part[s], part (S, N, M), in the order of s."""
    total = tl.zeros(mask.shape, tl.float32)
    for s in range(0, S):
        at = part_ptr + (s * N + rows)[:, None] * M + columns[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    return total


@triton.jit
def tail(
    tile,
    gate_ptr,
    rate_ptr,
    logits_ptr,
    hidden_ptr,
    stat_ptr,
    threshold_ptr,
    part_ptr,
    bias1_ptr,
    gamma_ptr,
    beta_ptr,
    weight2_ptr,
    bias2_ptr,
    noise_ptr,
    run_mean_ptr,
    run_var_ptr,
    run_count_ptr,
    run_rate_ptr,
    run_threshold_ptr,
    N,
    S,
    H,
    O,
    eps,
    temperature,
    norm_momentum,
    momentum,
    HIDDEN: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    UPDATE: tl.constexpr,
    TRAIN: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One tile of gates for the whole batch; tile 0 also writes what belongs to the hidden layer."""
    r = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    in_h, in_o = j < H, o < O
    bias2 = tl.load(bias2_ptr + o, mask=in_o, other=0.0)
    mean = tl.zeros((BLOCK_H,), tl.float32)
    rstd = tl.zeros((BLOCK_H,), tl.float32)
    gamma = tl.zeros((BLOCK_H,), tl.float32)
    beta = tl.zeros((BLOCK_H,), tl.float32)
    bias1 = tl.zeros((BLOCK_H,), tl.float32)
    weight2 = tl.zeros((BLOCK_H, BLOCK_O), tl.float32)
    if HIDDEN:
        gamma = tl.load(gamma_ptr + j, mask=in_h, other=0.0)
        beta = tl.load(beta_ptr + j, mask=in_h, other=0.0)
        bias1 = tl.load(bias1_ptr + j, mask=in_h, other=0.0)
        weight2 = tl.load(
            weight2_ptr + o[None, :] * H + j[:, None], mask=in_h[:, None] & in_o[None, :], other=0.0
        )
        if BATCH_STATS:
            # Two exact passes: E[h^2] - E[h]^2 would cancel.
            for start in range(0, N, BLOCK_N):
                mask = (start + r < N)[:, None] & in_h[None, :]
                h = sum_of_slices(part_ptr, start + r, j, mask, N, S, H)
                mean += tl.sum(tl.where(mask, h + bias1[None, :], 0.0), 0)
            mean = mean / N
            squares = tl.zeros((BLOCK_H,), tl.float32)
            for start in range(0, N, BLOCK_N):
                mask = (start + r < N)[:, None] & in_h[None, :]
                h = sum_of_slices(part_ptr, start + r, j, mask, N, S, H) + bias1[None, :]
                d = tl.where(mask, h - mean[None, :], 0.0)
                squares += tl.sum(d * d, 0)
            rstd = 1.0 / tl.sqrt(squares / N + eps)
            if UPDATE and tile == 0:
                old_mean = tl.load(run_mean_ptr + j, mask=in_h)
                old_var = tl.load(run_var_ptr + j, mask=in_h)
                tl.store(run_mean_ptr + j, old_mean + norm_momentum * (mean - old_mean), mask=in_h)
                tl.store(run_var_ptr + j, old_var + norm_momentum * (squares / (N - 1) - old_var), mask=in_h)
                tl.store(run_count_ptr, tl.load(run_count_ptr) + 1)
            if tile == 0:
                tl.store(stat_ptr + 2 * H + j, squares / (N - 1), mask=in_h)
        else:
            mean = tl.load(run_mean_ptr + j, mask=in_h, other=0.0)
            rstd = 1.0 / tl.sqrt(tl.load(run_var_ptr + j, mask=in_h, other=1.0) + eps)
        if tile == 0:
            tl.store(stat_ptr + j, mean, mask=in_h)
            tl.store(stat_ptr + H + j, rstd, mask=in_h)

    opened = tl.zeros((BLOCK_O,), tl.float32)
    total = tl.zeros((BLOCK_O,), tl.float32)
    threshold = tl.zeros((BLOCK_O,), tl.float32)
    if ESTIMATOR == "batch_mean" and not TRAIN:
        threshold = tl.load(run_threshold_ptr + o, mask=in_o, other=0.0)
    for start in range(0, N, BLOCK_N):
        rows = start + r
        in_n = rows < N
        mask = in_n[:, None] & in_o[None, :]
        if HIDDEN:
            mask_h = in_n[:, None] & in_h[None, :]
            h = sum_of_slices(part_ptr, rows, j, mask_h, N, S, H) + bias1[None, :]
            if tile == 0:
                tl.store(hidden_ptr + rows[:, None] * H + j[None, :], h, mask=mask_h)
            a = tl.maximum((h - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :], 0.0)
            z = tl.dot(tl.where(mask_h, a, 0.0), weight2, input_precision="ieee") + bias2[None, :]
        else:
            z = sum_of_slices(part_ptr, rows, o, mask, N, S, O) + bias2[None, :]
        at = rows[:, None] * O + o[None, :]
        tl.store(logits_ptr + at, z, mask=mask)
        if ESTIMATOR == "batch_mean" and TRAIN:
            total += tl.sum(tl.where(mask, z, 0.0), 0)
        else:
            u = z
            if NOISY:
                u = tl.load(noise_ptr + at, mask=mask, other=0.5)
            opens = decide(z, u, threshold[None, :], temperature, ESTIMATOR, NOISY) & mask
            tl.store(gate_ptr + at, opens.to(tl.float32).to(gate_ptr.dtype.element_ty), mask=mask)
            opened += tl.sum(opens.to(tl.float32), 0)
    if ESTIMATOR == "batch_mean" and TRAIN:
        threshold = total / N
        tl.debug_barrier()  # the logits stored above are read back by other threads
        for start in range(0, N, BLOCK_N):
            rows = start + r
            mask = (rows < N)[:, None] & in_o[None, :]
            at = rows[:, None] * O + o[None, :]
            z = tl.load(logits_ptr + at, mask=mask, other=0.0)
            opens = decide(z, z, threshold[None, :], temperature, ESTIMATOR, NOISY) & mask
            tl.store(gate_ptr + at, opens.to(tl.float32).to(gate_ptr.dtype.element_ty), mask=mask)
            opened += tl.sum(opens.to(tl.float32), 0)
    tl.store(threshold_ptr + o, threshold, mask=in_o)
    rate = opened / N  # a count below 2^24 is exact in fp32
    tl.store(rate_ptr + o, rate, mask=in_o)
    if UPDATE:
        old = tl.load(run_rate_ptr + o, mask=in_o)
        tl.store(run_rate_ptr + o, old + momentum * (rate - old), mask=in_o)
        if ESTIMATOR == "batch_mean":
            old = tl.load(run_threshold_ptr + o, mask=in_o)
            tl.store(run_threshold_ptr + o, old + momentum * (threshold - old), mask=in_o)


@triton.jit
def gate_tail(
    gate_ptr,
    rate_ptr,
    logits_ptr,
    hidden_ptr,
    stat_ptr,
    threshold_ptr,
    part_ptr,
    bias1_ptr,
    gamma_ptr,
    beta_ptr,
    weight2_ptr,
    bias2_ptr,
    noise_ptr,
    run_mean_ptr,
    run_var_ptr,
    run_count_ptr,
    run_rate_ptr,
    run_threshold_ptr,
    N,
    S,
    H,
    O,
    eps,
    temperature,
    norm_momentum,
    momentum,
    HIDDEN: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    UPDATE: tl.constexpr,
    TRAIN: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Write logits (N, O), gates (N, O), open rates (O,), statistics, from part; grid (O tiles,)."""
    tail(
        tl.program_id(0),
        gate_ptr,
        rate_ptr,
        logits_ptr,
        hidden_ptr,
        stat_ptr,
        threshold_ptr,
        part_ptr,
        bias1_ptr,
        gamma_ptr,
        beta_ptr,
        weight2_ptr,
        bias2_ptr,
        noise_ptr,
        run_mean_ptr,
        run_var_ptr,
        run_count_ptr,
        run_rate_ptr,
        run_threshold_ptr,
        N,
        S,
        H,
        O,
        eps,
        temperature,
        norm_momentum,
        momentum,
        HIDDEN,
        BATCH_STATS,
        UPDATE,
        TRAIN,
        ESTIMATOR,
        NOISY,
        BLOCK_N,
        BLOCK_H,
        BLOCK_O,
    )


@triton.jit
def gate_pool_dense(
    pooled_ptr,
    part_ptr,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    weight_ptr,
    ticket_ptr,
    C,
    HW,
    M,
    C_PER_SLICE,
    gate_ptr,
    rate_ptr,
    logits_ptr,
    hidden_ptr,
    stat_ptr,
    threshold_ptr,
    bias1_ptr,
    gamma_ptr,
    beta_ptr,
    weight2_ptr,
    bias2_ptr,
    noise_ptr,
    run_mean_ptr,
    run_var_ptr,
    run_count_ptr,
    run_rate_ptr,
    run_threshold_ptr,
    N,
    S,
    H,
    O,
    eps,
    temperature,
    norm_momentum,
    momentum,
    HIDDEN: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    UPDATE: tl.constexpr,
    TRAIN: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TICKET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write pooled (N, C), the mean of x over HW, and part (S, N, M), slices of pooled @ weight (M, C).T.

    Grid (N, S). With TICKET the program that finishes last runs the tail and sets the counter back to 0.
    """
    n = tl.program_id(0)
    split = tl.program_id(1)
    base = x_ptr + n.to(tl.int64) * x_stride_n  # 2^31 elements are in reach of a batch, not of a sample
    m = tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, C_PER_SLICE, BLOCK_C):
        c = split * C_PER_SLICE + start + tl.arange(0, BLOCK_C)
        in_c = c < C
        sums = tl.zeros((BLOCK_C,), tl.float32)
        for s0 in range(0, HW, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            at = base + c[:, None] * x_stride_c + s[None, :] * x_stride_s
            x = tl.load(at, mask=in_c[:, None] & (s < HW)[None, :], other=0.0)
            sums += tl.sum(x.to(tl.float32), 1)
        pooled = sums / HW
        tl.store(pooled_ptr + n * C + c, pooled, mask=in_c)
        weight = tl.load(
            weight_ptr + m[:, None] * C + c[None, :], mask=(m < M)[:, None] & in_c[None, :], other=0.0
        )
        product += tl.sum(weight * pooled[None, :], 1)
    tl.store(part_ptr + (split * N + n) * M + m, product, mask=m < M)
    if TICKET:
        tl.debug_barrier()  # the stores of all threads come before the release of the one that draws
        drawn = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
        if drawn == N * S - 1:
            tl.debug_barrier()
            tail(
                0,
                gate_ptr,
                rate_ptr,
                logits_ptr,
                hidden_ptr,
                stat_ptr,
                threshold_ptr,
                part_ptr,
                bias1_ptr,
                gamma_ptr,
                beta_ptr,
                weight2_ptr,
                bias2_ptr,
                noise_ptr,
                run_mean_ptr,
                run_var_ptr,
                run_count_ptr,
                run_rate_ptr,
                run_threshold_ptr,
                N,
                S,
                H,
                O,
                eps,
                temperature,
                norm_momentum,
                momentum,
                HIDDEN,
                BATCH_STATS,
                UPDATE,
                TRAIN,
                ESTIMATOR,
                NOISY,
                BLOCK_N,
                BLOCK_H,
                BLOCK_O,
            )
            tl.store(ticket_ptr, 0)


@triton.jit
def gate_dense(
    part_ptr,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    weight_ptr,
    N,
    K,
    HW,
    M,
    K_PER_SLICE,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write part (S, N, M), slices of x (N, K) @ weight (M, K).T; feature k is (k // HW, k % HW).

    Grid (N tiles, S, M tiles). fp32 without tensor cores: rounded products would move logits across their
    threshold.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = x_ptr + n.to(tl.int64)[:, None] * x_stride_n
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K_PER_SLICE, BLOCK_K):
        k = split * K_PER_SLICE + start + tl.arange(0, BLOCK_K)
        at = (k // HW) * x_stride_c + (k % HW) * x_stride_s
        x = tl.load(rows + at[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0
        )
        total = tl.dot(x.to(tl.float32), weight, total, input_precision="ieee")
    tl.store(
        part_ptr + (split * N + n)[:, None] * M + m[None, :], total, mask=(n < N)[:, None] & (m < M)[None, :]
    )
