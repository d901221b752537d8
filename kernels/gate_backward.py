"""Backward kernels of a gate; shapes, number formats and the order of sums as in ``gate_tail`` and ``gate_rows``.

Two launches: ``gate_backward_rows`` (``gate_backward_logits`` where there is no hidden layer), then
``gate_backward_dense``. What the norm's backward needs of the whole batch leaves the first launch as sums over row
tiles, T of them, which every program of the second adds up for itself.

CENTRE: the threshold was the batch mean of the logits, so dz - mean(dz) goes on. At the hidden layer that is a vector
to subtract, mean(dz) @ weight2, which is another sum over row tiles.
"""

import triton
import triton.language as tl

from .gate_tail import logistic_noise, relu

SUMS = 5  # rows of ``sums``: see gate_backward_rows


@triton.jit
def through_estimator(d, z, u, threshold, temperature, ESTIMATOR: tl.constexpr, NOISY: tl.constexpr):
    """Gradient d of a gate as gradient of its logit z."""
    if ESTIMATOR == "bernoulli":
        p = tl.sigmoid(z)
        result = d * (p * (1.0 - p))
    elif ESTIMATOR == "gumbel":
        if NOISY:
            z = z + logistic_noise(u)
        s = tl.sigmoid(z / temperature)
        result = d * (s * (1.0 - s) / temperature)
    else:
        # Eq. 4, ends included. Outside of the window 0, whatever d is.
        result = tl.where(tl.abs(z - threshold) <= 1.0, d, 0.0)
    return result


@triton.jit
def logit_gradient(
    d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, rows, o, mask, N, O, temperature,
    HAS_GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_LOGITS: tl.constexpr, ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr,
):  # fmt: skip
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
        result = through_estimator(result, z, u, threshold[None, :], temperature, ESTIMATOR, NOISY)
    if HAS_LOGITS:
        result += tl.load(d_logits_ptr + at, mask=mask, other=0.0)
    return tl.where(mask, result, 0.0)


@triton.jit
def centre_of_tile(
    d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, o, N, O, temperature,
    CENTRE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RATE: tl.constexpr, ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """CENTRE: the mean over the batch of what comes back through the gates of a tile; else 0."""
    r = tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_O,), tl.float32)
    if CENTRE:
        for start in range(0, N, BLOCK_N):
            mask = (start + r < N)[:, None] & (o < O)[None, :]
            dz = logit_gradient(
                d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, start + r, o, mask, N, O,
                temperature, HAS_GATE, HAS_RATE, False, ESTIMATOR, NOISY,
            )  # fmt: skip
            mean += tl.sum(dz, 0)
    return mean / N


@triton.jit
def gate_backward_logits(
    dz_ptr, d_bias2_ptr, d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, N, O, temperature,
    CENTRE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_LOGITS: tl.constexpr,
    ESTIMATOR: tl.constexpr, NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Write dz (N, O) and d bias2 (O,). Grid (O tiles,)."""
    r = tl.arange(0, BLOCK_N)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    mean = centre_of_tile(
        d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, o, N, O, temperature, CENTRE,
        HAS_GATE, HAS_RATE, ESTIMATOR, NOISY, BLOCK_N, BLOCK_O,
    )  # fmt: skip
    d_bias = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + r
        mask = (rows < N)[:, None] & (o < O)[None, :]
        dz = logit_gradient(
            d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, rows, o, mask, N, O,
            temperature, HAS_GATE, HAS_RATE, HAS_LOGITS, ESTIMATOR, NOISY,
        )  # fmt: skip
        dz = tl.where(mask, dz - mean[None, :], 0.0)
        tl.store(dz_ptr + rows[:, None] * O + o[None, :], dz, mask=mask)
        d_bias += tl.sum(dz, 0)
    tl.store(d_bias2_ptr + o, d_bias, mask=o < O)


@triton.jit
def rows_of_hidden(
    tile, da_ptr, sums_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr, weight2_ptr, d_gate_ptr, d_rate_ptr,
    d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, N, H, O, T, temperature, CENTRE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_LOGITS: tl.constexpr, ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One row tile: da = dz @ weight2, not yet centred nor stopped by the ReLU, and its share of the sums."""
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    in_n, in_h = rows < N, j < H
    mask_h = in_n[:, None] & in_h[None, :]
    da = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    centre = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, O, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        in_o = o < O
        mask = in_n[:, None] & in_o[None, :]
        weight2 = tl.load(weight2_ptr + o[:, None] * H + j[None, :], mask=in_o[:, None] & in_h[None, :], other=0.0)
        dz = logit_gradient(
            d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, rows, o, mask, N, O,
            temperature, HAS_GATE, HAS_RATE, HAS_LOGITS and not CENTRE, ESTIMATOR, NOISY,
        )  # fmt: skip
        if CENTRE:
            centre += tl.sum(tl.sum(dz, 0)[:, None] * weight2, 0)
            if HAS_LOGITS:
                dz += tl.load(d_logits_ptr + rows[:, None] * O + o[None, :], mask=mask, other=0.0)
        da = tl.dot(dz, weight2, da, input_precision="ieee")
    tl.store(da_ptr + rows[:, None] * H + j[None, :], da, mask=mask_h)
    mean = tl.load(stat_ptr + j, mask=in_h, other=0.0)
    rstd = tl.load(stat_ptr + H + j, mask=in_h, other=0.0)
    gamma = tl.load(gamma_ptr + j, mask=in_h, other=0.0)
    beta = tl.load(beta_ptr + j, mask=in_h, other=0.0)
    h = tl.load(hidden_ptr + rows[:, None] * H + j[None, :], mask=mask_h, other=0.0)
    normed = tl.where(mask_h, (h - mean[None, :]) * rstd[None, :], 0.0)
    shut = normed * gamma[None, :] + beta[None, :] <= 0.0  # NaN is not shut, as in PyTorch
    da = tl.where(shut | ~mask_h, 0.0, da)
    at = sums_ptr + tile * H + j
    tl.store(at, tl.sum(da, 0), mask=in_h)
    tl.store(at + T * H, tl.sum(da * normed, 0), mask=in_h)
    if CENTRE:
        passed = tl.where(shut | ~mask_h, 0.0, 1.0)
        tl.store(at + 2 * T * H, centre, mask=in_h)
        tl.store(at + 3 * T * H, tl.sum(passed, 0), mask=in_h)
        tl.store(at + 4 * T * H, tl.sum(passed * normed, 0), mask=in_h)


@triton.jit
def weights_of_gates(
    tile, d_weight2_ptr, d_bias2_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr, d_gate_ptr, d_rate_ptr,
    d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, N, H, O, temperature, CENTRE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_LOGITS: tl.constexpr, ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The second dense layer's gradients for one tile of gates."""
    r = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    in_h, in_o = j < H, o < O
    centre = centre_of_tile(
        d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, o, N, O, temperature, CENTRE,
        HAS_GATE, HAS_RATE, ESTIMATOR, NOISY, BLOCK_N, BLOCK_O,
    )  # fmt: skip
    mean = tl.load(stat_ptr + j, mask=in_h, other=0.0)
    rstd = tl.load(stat_ptr + H + j, mask=in_h, other=0.0)
    gamma = tl.load(gamma_ptr + j, mask=in_h, other=0.0)
    beta = tl.load(beta_ptr + j, mask=in_h, other=0.0)
    d_weight2 = tl.zeros((BLOCK_O, BLOCK_H), tl.float32)
    d_bias2 = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + r
        mask = (rows < N)[:, None] & in_o[None, :]
        mask_h = (rows < N)[:, None] & in_h[None, :]
        dz = logit_gradient(
            d_gate_ptr, d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, rows, o, mask, N, O,
            temperature, HAS_GATE, HAS_RATE, HAS_LOGITS, ESTIMATOR, NOISY,
        )  # fmt: skip
        dz = tl.where(mask, dz - centre[None, :], 0.0)
        h = tl.load(hidden_ptr + rows[:, None] * H + j[None, :], mask=mask_h, other=0.0)
        a = relu((h - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :])
        d_weight2 = tl.dot(tl.trans(dz), tl.where(mask_h, a, 0.0), d_weight2, input_precision="ieee")
        d_bias2 += tl.sum(dz, 0)
    at = d_weight2_ptr + o[:, None] * H + j[None, :]
    tl.store(at, d_weight2, mask=in_o[:, None] & in_h[None, :])
    tl.store(d_bias2_ptr + o, d_bias2, mask=in_o)


@triton.jit
def gate_backward_rows(
    da_ptr, sums_ptr, d_weight2_ptr, d_bias2_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr, weight2_ptr, d_gate_ptr,
    d_rate_ptr, d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, N, H, O, T, temperature, CENTRE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_LOGITS: tl.constexpr, ESTIMATOR: tl.constexpr,
    NOISY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Write da (N, H), sums (5, T, H), d weight2 (O, H), d bias2 (O,). Grid (T row tiles + O tiles,).

    sums: of da past the ReLU, and times the normed hidden layer; with CENTRE also of dz @ weight2, and of ones past
    the ReLU, and times the normed hidden layer.
    """
    i = tl.program_id(0)
    if i < T:
        rows_of_hidden(
            i, da_ptr, sums_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr, weight2_ptr, d_gate_ptr, d_rate_ptr,
            d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, N, H, O, T, temperature, CENTRE, HAS_GATE, HAS_RATE,
            HAS_LOGITS, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip
    else:
        weights_of_gates(
            i - T, d_weight2_ptr, d_bias2_ptr, hidden_ptr, stat_ptr, gamma_ptr, beta_ptr, d_gate_ptr, d_rate_ptr,
            d_logits_ptr, logits_ptr, noise_ptr, threshold_ptr, N, H, O, temperature, CENTRE, HAS_GATE, HAS_RATE,
            HAS_LOGITS, ESTIMATOR, NOISY, BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip
