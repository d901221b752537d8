"""The end of a gate's forward: hidden layer's norm -> ReLU -> dense -> 0/1 decision, open rates, running buffers.

Shapes: N samples, H hidden units, O gates, S slices in which the first dense layer's products come. Everything is
fp32 but the gates. All sums have a fixed order: there is no atomic on a float, so results repeat bit for bit.

Statistics over the batch are recomputed by whoever needs them from the N * H numbers of the hidden layer, which is
cheaper than a barrier over the grid. ``gate_tail`` is a launch of its own, a program for every tile of gates; or the
last program of the row pass goes through all tiles in the same launch (``finish``).
"""

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, as PyTorch's does; the hardware's maximum would return 0."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def logistic_noise(u):
    """Logistic noise of uniform u on [0, 1), kept off the ends, where it is infinite and its gradient NaN."""
    u = tl.minimum(tl.maximum(u, 1.1754943508222875e-38), 0.9999998807907104)
    return tl.log(u) - tl.log(1.0 - u)


@triton.jit
def decide(z, u, threshold, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr):
    """Whether a gate opens: logits z, uniform noise u, threshold of the batch-mean estimator."""
    if ESTIMATOR == "bernoulli" and NOISY:
        opens = u < tl.sigmoid(z)
    elif ESTIMATOR == "gumbel" and NOISY:
        opens = z + logistic_noise(u) > 0.0
    elif ESTIMATOR == "batch_mean":
        opens = z - threshold > 0.0
    else:
        opens = z > 0.0
    return opens


@triton.jit
def sum_of_slices(part_ptr, rows, columns, mask, N, S, M):
    """Rows and columns of sum_s part[s], part (S, N, M), in the order of s."""
    total = tl.zeros(mask.shape, tl.float32)
    for s in range(0, S):
        at = part_ptr + (s * N + rows)[:, None] * M + columns[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    return total


@triton.jit
def hidden_statistics(
    first, stat_ptr, part_ptr, bias1_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, N, S, H, eps, norm_momentum,
    HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr, UPDATE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(var + eps) of the hidden layer; ``first`` writes them down and moves the running ones."""
    r = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    in_h = j < H
    mean = tl.zeros((BLOCK_H,), tl.float32)
    rstd = tl.zeros((BLOCK_H,), tl.float32)
    if HIDDEN and BATCH_STATS:
        bias1 = tl.load(bias1_ptr + j, mask=in_h, other=0.0)
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
        if first:
            unbiased = squares / (N - 1)
            tl.store(stat_ptr + 2 * H + j, unbiased, mask=in_h)
            if UPDATE:
                old_mean = tl.load(run_mean_ptr + j, mask=in_h)
                old_var = tl.load(run_var_ptr + j, mask=in_h)
                tl.store(run_mean_ptr + j, old_mean + norm_momentum * (mean - old_mean), mask=in_h)
                tl.store(run_var_ptr + j, old_var + norm_momentum * (unbiased - old_var), mask=in_h)
                tl.store(run_count_ptr, tl.load(run_count_ptr) + 1)
    elif HIDDEN:
        var = tl.load(run_var_ptr + j, mask=in_h, other=1.0)
        mean = tl.load(run_mean_ptr + j, mask=in_h, other=0.0)
        rstd = 1.0 / tl.sqrt(var + eps)
        if first:
            tl.store(stat_ptr + 2 * H + j, var, mask=in_h)
    if HIDDEN and first:
        tl.store(stat_ptr + j, mean, mask=in_h)
        tl.store(stat_ptr + H + j, rstd, mask=in_h)
    return mean, rstd


@triton.jit
def decide_tile(
    tile, mean, rstd, gate_ptr, rate_ptr, logits_ptr, hidden_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr,
    beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_rate_ptr, run_threshold_ptr, N, S, H, O, momentum,
    HIDDEN: tl.constexpr, UPDATE: tl.constexpr, TRAIN: tl.constexpr, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One tile of gates for the whole batch; tile 0 also writes the hidden layer."""
    r = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    in_h, in_o = j < H, o < O
    bias2 = tl.load(bias2_ptr + o, mask=in_o, other=0.0)
    gamma, beta, bias1, weight2 = mean, mean, mean, mean
    if HIDDEN:
        gamma = tl.load(gamma_ptr + j, mask=in_h, other=0.0)
        beta = tl.load(beta_ptr + j, mask=in_h, other=0.0)
        bias1 = tl.load(bias1_ptr + j, mask=in_h, other=0.0)
        weight2 = tl.load(weight2_ptr + o[None, :] * H + j[:, None], mask=in_h[:, None] & in_o[None, :], other=0.0)
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
            a = relu((h - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :])
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
            opens = decide(z, u, threshold[None, :], ESTIMATOR, NOISY) & mask
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
            opens = decide(z, z, threshold[None, :], ESTIMATOR, NOISY) & mask
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
def tail(
    tile, tiles, gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr,
    beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, run_rate_ptr,
    run_threshold_ptr, N, S, H, O, eps, norm_momentum, momentum, HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr,
    UPDATE: tl.constexpr, TRAIN: tl.constexpr, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Tiles [tile, tiles) of the gates; the program that has tile 0 also writes what belongs to the hidden layer."""
    mean, rstd = hidden_statistics(
        tile == 0, stat_ptr, part_ptr, bias1_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, N, S, H, eps,
        norm_momentum, HIDDEN, BATCH_STATS, UPDATE, BLOCK_N, BLOCK_H,
    )  # fmt: skip
    for t in range(tile, tiles):
        decide_tile(
            t, mean, rstd, gate_ptr, rate_ptr, logits_ptr, hidden_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr,
            beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_rate_ptr, run_threshold_ptr, N, S, H, O, momentum,
            HIDDEN, UPDATE, TRAIN, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip


@triton.jit
def gate_tail(
    gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr, gamma_ptr, beta_ptr,
    weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, run_rate_ptr, run_threshold_ptr,
    N, S, H, O, eps, norm_momentum, momentum, HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr, UPDATE: tl.constexpr,
    TRAIN: tl.constexpr, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Write logits (N, O), gates (N, O), open rates (O,), statistics, from part (S, N, H or O); grid (O tiles,)."""
    tile = tl.program_id(0)
    tail(
        tile, tile + 1, gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr,
        gamma_ptr, beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr,
        run_rate_ptr, run_threshold_ptr, N, S, H, O, eps, norm_momentum, momentum, HIDDEN, BATCH_STATS, UPDATE,
        TRAIN, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
    )  # fmt: skip


@triton.jit
def finish(
    ticket_ptr, programs, gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr, bias1_ptr,
    gamma_ptr, beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr, run_count_ptr, run_rate_ptr,
    run_threshold_ptr, N, S, H, O, eps, norm_momentum, momentum, HIDDEN: tl.constexpr, BATCH_STATS: tl.constexpr,
    UPDATE: tl.constexpr, TRAIN: tl.constexpr, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Run the whole tail in the program that comes here last, and set the counter back to 0; no program waits."""
    tl.debug_barrier()  # the stores of all threads come before the release of the one that draws
    drawn = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if drawn == programs - 1:
        tl.debug_barrier()
        tail(
            0, tl.cdiv(O, BLOCK_O), gate_ptr, rate_ptr, logits_ptr, hidden_ptr, stat_ptr, threshold_ptr, part_ptr,
            bias1_ptr, gamma_ptr, beta_ptr, weight2_ptr, bias2_ptr, noise_ptr, run_mean_ptr, run_var_ptr,
            run_count_ptr, run_rate_ptr, run_threshold_ptr, N, S, H, O, eps, norm_momentum, momentum, HIDDEN,
            BATCH_STATS, UPDATE, TRAIN, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip
        tl.store(ticket_ptr, 0)
