"""A gate's forward: features -> dense -> BatchNorm -> ReLU -> dense -> 0/1 decision, in two launches.

Shapes: N samples, C channels, HW positions of a map, K features (C pooled, or C*HW flattened), M units of the first
dense layer, S slices that the features are split into, H hidden units, O gates. Inputs are of any floating dtype;
after the load everything is fp32 without tensor cores, since rounded products would move logits across their
threshold. All sums have a fixed order and no float is added atomically, so results repeat bit for bit.

The row pass (``gate_pool_dense``, ``gate_pool_wide`` or ``gate_dense``) writes part (S, N, M), the slices of
features @ weight.T. ``gate_tail`` does the rest, one program for every tile of gates: each recomputes the batch
statistics from the N * H numbers of the hidden layer, which is cheaper than a barrier over the grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .common import FIXED_ORDER, TILE, as_map, ceil_div, map_at, move_running, multiprocessors, power_of_two, relu

# The four numbers below follow from sizes and register counts; their speed is unmeasured.
DENSE_ROWS = 16  # samples that share one read of a weight: the least that tl.dot takes
SPLIT_ABOVE = 1 << 16  # elements of a sample above which several programs share its channels; CIFAR maps have less
POOL_UNITS = 64  # units of the first layer above which a program pools several samples: the weight tile would spill
SLICE_FEATURES = 512  # features of a slice, at least


class GateForward(NamedTuple):
    """The results of a forward; all fp32 but ``gate``.

    gate (N, O); rate (O,), mean of the gates; logits (N, O); pooled (N, C), empty if nothing was pooled;
    hidden (N, H); stat (3, H): mean, 1 / sqrt(var + eps), variance (of the batch: unbiased); threshold (O,).
    """

    gate: Tensor | None
    rate: Tensor | None
    logits: Tensor
    pooled: Tensor
    hidden: Tensor
    stat: Tensor
    threshold: Tensor


class PooledRows(NamedTuple):
    """Outputs of the pooling row passes: part (S, N, M), pooled (N, C)."""

    part: Tensor
    pooled: Tensor


@triton.jit
def channel_means(x, n, c, C, HW, BLOCK_C, BLOCK_S):
    """Means of some channels of sample n."""
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        value = tl.load(map_at(x, n, c, s), mask=(c < C)[:, None] & (s < HW)[None, :], other=0.0)
        sums += tl.sum(value.to(tl.float32), 1)
    return sums / HW


@triton.jit
def gate_pool_dense(
    out, x, weight_ptr, N, C, HW, M, C_PER_SLICE, BLOCK_M: constexpr, BLOCK_C: constexpr, BLOCK_S: constexpr
):
    """Write pooled, the mean of x (N, C, HW) over HW, and part, slices of pooled @ weight (M, C).T. Grid (N, S)."""
    n = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, C_PER_SLICE, BLOCK_C):
        c = split * C_PER_SLICE + start + tl.arange(0, BLOCK_C)
        pooled = channel_means(x, n, c, C, HW, BLOCK_C, BLOCK_S)
        tl.store(out.pooled + n * C + c, pooled, mask=c < C)
        mask = (m < M)[:, None] & (c < C)[None, :]
        weight = tl.load(weight_ptr + m[:, None] * C + c[None, :], mask=mask, other=0.0)
        product += tl.sum(weight * pooled[None, :], 1)
    tl.store(out.part + (split * N + n) * M + m, product, mask=m < M)


@triton.jit
def gate_pool_wide(
    out, x, weight_ptr, N, C, HW, M, BLOCK_R: constexpr, BLOCK_M: constexpr, BLOCK_C: constexpr, BLOCK_S: constexpr
):
    """Do as gate_pool_dense, for many units: a weight is read once for BLOCK_R samples. Grid (N tiles, S = C tiles)."""
    r = tl.arange(0, BLOCK_R)
    first = tl.program_id(0) * BLOCK_R
    split = tl.program_id(1)
    c = split * BLOCK_C + tl.arange(0, BLOCK_C)
    pooled = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(0, tl.minimum(N - first, BLOCK_R)):
        mean = channel_means(x, first + i, c, C, HW, BLOCK_C, BLOCK_S)
        tl.store(out.pooled + (first + i) * C + c, mean, mask=c < C)
        pooled = tl.where((r == i)[:, None], mean[None, :], pooled)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (c < C)[:, None] & (m < M)[None, :]
        weight = tl.load(weight_ptr + m[None, :] * C + c[:, None], mask=mask, other=0.0)
        product = tl.dot(pooled, weight, input_precision="ieee")
        at = out.part + (split * N + first + r)[:, None] * M + m[None, :]
        tl.store(at, product, mask=(first + r < N)[:, None] & (m < M)[None, :])


@triton.jit
def gate_dense(
    part_ptr, x, weight_ptr, N, K, HW, M, K_PER_SLICE, BLOCK_R: constexpr, BLOCK_M: constexpr, BLOCK_K: constexpr
):
    """Write part, slices of x (N, K) @ weight (M, K).T; feature k is (k // HW, k % HW). Grid (N tiles, S, M tiles)."""
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = x.ptr + n.to(tl.int64)[:, None] * x.stride_n
    total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, K_PER_SLICE, BLOCK_K):
        k = split * K_PER_SLICE + start + tl.arange(0, BLOCK_K)
        at = (k // HW) * x.stride_c + (k % HW) * x.stride_s
        value = tl.load(rows + at[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        mask = (k < K)[:, None] & (m < M)[None, :]
        weight = tl.load(weight_ptr + m[None, :] * K + k[:, None], mask=mask, other=0.0)
        total = tl.dot(value.to(tl.float32), weight, total, input_precision="ieee")
    at = part_ptr + (split * N + n)[:, None] * M + m[None, :]
    tl.store(at, total, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def logistic_noise(u):
    """Logistic noise of uniform u on [0, 1), kept off the ends, where it is infinite and its gradient NaN."""
    u = tl.minimum(tl.maximum(u, 1.1754943508222875e-38), 0.9999998807907104)
    return tl.log(u) - tl.log(1.0 - u)


@triton.jit
def decide(z, u, threshold, ESTIMATOR):
    """Whether a gate opens: logits z, uniform noise u or None, threshold of the batch-mean estimator."""
    if ESTIMATOR == "batch_mean":
        opens = z - threshold > 0.0
    elif u is None or ESTIMATOR == "ste":
        opens = z > 0.0
    elif ESTIMATOR == "bernoulli":
        opens = u < tl.sigmoid(z)
    else:
        opens = z + logistic_noise(u) > 0.0
    return opens


@triton.jit
def store_gates(out, z, u, threshold, at, mask, ESTIMATOR):
    """Decide a tile of logits, write the gates, and return how many samples open each."""
    opens = decide(z, u, threshold[None, :], ESTIMATOR) & mask
    tl.store(out.gate + at, opens.to(tl.float32).to(out.gate.dtype.element_ty), mask=mask)
    return tl.sum(opens.to(tl.float32), 0)


@triton.jit
def sum_of_slices(part_ptr, rows, columns, mask, N, S, M):
    """Rows and columns of sum_s part[s], part (S, N, M), in the order of s."""
    total = tl.zeros(mask.shape, tl.float32)
    for s in range(0, S):
        total += tl.load(part_ptr + (s * N + rows)[:, None] * M + columns[None, :], mask=mask, other=0.0)
    return total


@triton.jit
def hidden_statistics(
    stat_ptr, part_ptr, parameters, running, N, S, H, eps, momentum, BATCH_STATS, UPDATE, BLOCK_N, BLOCK_H
):
    """Mean and 1 / sqrt(var + eps) of the hidden layer; program 0 writes stat and moves the running statistics."""
    j = tl.arange(0, BLOCK_H)
    in_h = j < H
    if BATCH_STATS:
        mean = tl.zeros((BLOCK_H,), tl.float32)
        squares = tl.zeros((BLOCK_H,), tl.float32)
        bias1 = tl.load(parameters.bias1 + j, mask=in_h, other=0.0)
        # Two exact passes: E[h^2] - E[h]^2 would cancel.
        for start in range(0, N, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            mask = (rows < N)[:, None] & in_h[None, :]
            h = sum_of_slices(part_ptr, rows, j, mask, N, S, H) + bias1[None, :]
            mean += tl.sum(tl.where(mask, h, 0.0), 0)
        mean = mean / N
        for start in range(0, N, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            mask = (rows < N)[:, None] & in_h[None, :]
            h = sum_of_slices(part_ptr, rows, j, mask, N, S, H) + bias1[None, :]
            d = tl.where(mask, h - mean[None, :], 0.0)
            squares += tl.sum(d * d, 0)
        rstd = 1.0 / tl.sqrt(squares / N + eps)
        var = squares / (N - 1)
    else:
        var = tl.load(running.var + j, mask=in_h, other=1.0)
        mean = tl.load(running.mean + j, mask=in_h, other=0.0)
        rstd = 1.0 / tl.sqrt(var + eps)
    if tl.program_id(0) == 0:
        tl.store(stat_ptr + j, mean, mask=in_h)
        tl.store(stat_ptr + H + j, rstd, mask=in_h)
        tl.store(stat_ptr + 2 * H + j, var, mask=in_h)
        if BATCH_STATS and UPDATE:
            move_running(running.mean + j, mean, momentum, in_h)
            move_running(running.var + j, var, momentum, in_h)
            batches = tl.load(running.batches)
            tl.debug_barrier()
            tl.store(running.batches, batches + 1)
    return mean, rstd


@triton.jit
def gate_tail(
    out,
    part_ptr,
    parameters,
    noise_ptr,
    running,
    N,
    S,
    H,
    O,
    eps,
    norm_momentum,
    momentum,
    ESTIMATOR: constexpr,
    BATCH_STATS: constexpr,
    TRAIN: constexpr,
    UPDATE: constexpr,
    BLOCK_N: constexpr,
    BLOCK_H: constexpr,
    BLOCK_O: constexpr,
):
    """Write gate, rate, logits, hidden, stat and threshold from part (S, N, H or O). Grid (O tiles,)."""
    r = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_h, in_o = j < H, o < O
    bias2 = tl.load(parameters.bias2 + o, mask=in_o, other=0.0)
    if parameters.weight1 is not None:
        mean, rstd = hidden_statistics(
            out.stat, part_ptr, parameters, running, N, S, H, eps, norm_momentum, BATCH_STATS, UPDATE, BLOCK_N, BLOCK_H
        )
        gamma = tl.load(parameters.norm_weight + j, mask=in_h, other=0.0)
        beta = tl.load(parameters.norm_bias + j, mask=in_h, other=0.0)
        bias1 = tl.load(parameters.bias1 + j, mask=in_h, other=0.0)
        at = parameters.weight2 + o[None, :] * H + j[:, None]
        weight2 = tl.load(at, mask=in_h[:, None] & in_o[None, :], other=0.0)
    opened = tl.zeros((BLOCK_O,), tl.float32)
    total = tl.zeros((BLOCK_O,), tl.float32)
    threshold = tl.zeros((BLOCK_O,), tl.float32)
    if ESTIMATOR == "batch_mean" and not TRAIN:
        threshold = tl.load(running.threshold + o, mask=in_o, other=0.0)
    for start in range(0, N, BLOCK_N):
        rows = start + r
        mask = (rows < N)[:, None] & in_o[None, :]
        if parameters.weight1 is not None:
            mask_h = (rows < N)[:, None] & in_h[None, :]
            h = sum_of_slices(part_ptr, rows, j, mask_h, N, S, H) + bias1[None, :]
            if tl.program_id(0) == 0:
                tl.store(out.hidden + rows[:, None] * H + j[None, :], h, mask=mask_h)
            a = relu((h - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :])
            z = tl.dot(tl.where(mask_h, a, 0.0), weight2, input_precision="ieee") + bias2[None, :]
        else:
            z = sum_of_slices(part_ptr, rows, o, mask, N, S, O) + bias2[None, :]
        row_at = rows[:, None] * O + o[None, :]
        tl.store(out.logits + row_at, z, mask=mask)
        if ESTIMATOR == "batch_mean" and TRAIN:
            total += tl.sum(tl.where(mask, z, 0.0), 0)
        else:
            u = None
            if noise_ptr is not None:
                u = tl.load(noise_ptr + row_at, mask=mask, other=0.5)
            opened += store_gates(out, z, u, threshold, row_at, mask, ESTIMATOR)
    if ESTIMATOR == "batch_mean" and TRAIN:
        threshold = total / N
        tl.debug_barrier()  # the logits stored above are read back by other threads
        for start in range(0, N, BLOCK_N):
            mask = (start + r < N)[:, None] & in_o[None, :]
            row_at = (start + r)[:, None] * O + o[None, :]
            z = tl.load(out.logits + row_at, mask=mask, other=0.0)
            opened += store_gates(out, z, None, threshold, row_at, mask, ESTIMATOR)
    rate = opened / N  # a count below 2^24 is exact in fp32
    tl.store(out.threshold + o, threshold, mask=in_o)
    tl.store(out.rate + o, rate, mask=in_o)
    if UPDATE:
        move_running(running.open_rate + o, rate, momentum, in_o)
        if ESTIMATOR == "batch_mean":
            move_running(running.threshold + o, threshold, momentum, in_o)


def forward(
    x: Tensor, parameters: Any, running: Any, options: Any, noise: Tensor | None, *, dtype: torch.dtype, update: bool
) -> GateForward:
    """Decide for x (N, C, H, W), pooled unless ``options.flatten``, or for features x (N, K).

    Args:
        x: of any floating dtype.
        parameters: a tuple of weight1, bias1, norm_weight, norm_bias, weight2, bias2, as `gatedconv.ops.gate` takes it.
        running: a tuple of mean, var, batches, open_rate, threshold, likewise.
        options: an object with the attributes of `gatedconv.ops.GateOptions`.
        noise: (N, O), uniform on [0, 1), or None.
        dtype: of the gate.
        update: move the running buffers in place.
    """
    first = parameters.weight2 if parameters.weight1 is None else parameters.weight1
    units, gates = first.shape[0], parameters.weight2.shape[0]
    hidden = 0 if parameters.weight1 is None else units
    pooling = x.dim() == 4 and not options.flatten
    new: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    out = GateForward(
        torch.empty(x.shape[0], gates, device=x.device, dtype=dtype),
        torch.empty(gates, **new),
        torch.empty(x.shape[0], gates, **new),
        torch.empty((x.shape[0], x.shape[1]) if pooling else (0,), **new),
        torch.empty(x.shape[0], hidden, **new),
        torch.empty(3, hidden, **new),
        torch.empty(gates, **new),
    )
    tiles = tail_tiles(hidden)
    with torch.cuda.device_of(x):
        part = _pooled_rows(x, first, out.pooled) if pooling else _dense_rows(x, first)
        noise = None if noise is None else noise.contiguous()
        sizes = (x.shape[0], part.shape[0], hidden, gates)
        numbers = (options.eps, options.norm_momentum or 0.0, options.momentum)
        flags = {"BATCH_STATS": options.batch_stats, "TRAIN": options.training, "UPDATE": update, **FIXED_ORDER}
        gate_tail[(ceil_div(gates, tiles["BLOCK_O"]),)](
            out, part, parameters, noise, running, *sizes, *numbers, ESTIMATOR=options.estimator, **flags, **tiles
        )
    return out


def tail_tiles(hidden: int) -> dict[str, Any]:
    """Tiles over rows of a hidden layer: 1024 of its numbers at a time, in loops too short to pipeline."""
    block_h = power_of_two(hidden, 16)
    return {"BLOCK_N": max(16, 1024 // block_h), "BLOCK_H": block_h, "BLOCK_O": 16, "num_stages": 1}


def _pooled_rows(x: Tensor, weight: Tensor, pooled: Tensor) -> Tensor:
    """Fill pooled, the mean of x over its positions, and return part (S, N, M)."""
    x_map = as_map(x)
    (units, channels), batch, pixels = weight.shape, x.shape[0], x.shape[2] * x.shape[3]
    wide = units > POOL_UNITS
    block_c = power_of_two(channels, 16 if wide else 1, 64)
    split = wide or channels * pixels > SPLIT_ABOVE
    per_slice = block_c if split else ceil_div(channels, block_c) * block_c
    part = torch.empty(ceil_div(channels, per_slice), batch, units, device=x.device, dtype=torch.float32)
    block_s = power_of_two(pixels, most=TILE // block_c)
    blocks: dict[str, Any] = {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_stages": 1, **FIXED_ORDER}
    given = (PooledRows(part, pooled), x_map, weight, batch, channels, pixels, units)
    if wide:
        gate_pool_wide[(ceil_div(batch, DENSE_ROWS), part.shape[0])](*given, BLOCK_R=DENSE_ROWS, BLOCK_M=32, **blocks)
    else:
        gate_pool_dense[(batch, part.shape[0])](*given, per_slice, BLOCK_M=power_of_two(units, 16), **blocks)
    return part


def _dense_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return part (S, N, M) of features (N, K), or of a map to flatten."""
    (units, features), batch = weight.shape, x.shape[0]
    pixels = x.shape[2:].numel()
    block_m = power_of_two(units, 16, 32)
    tiles = ceil_div(batch, DENSE_ROWS) * ceil_div(units, block_m)
    # About one program per multiprocessor; more than 32 slices take the tail longer to add up.
    slices = max(1, min(32, ceil_div(features, SLICE_FEATURES), ceil_div(multiprocessors(x.device), tiles)))
    per_slice = ceil_div(ceil_div(features, slices), 64) * 64
    part = torch.empty(ceil_div(features, per_slice), batch, units, device=x.device, dtype=torch.float32)
    blocks: dict[str, Any] = {"BLOCK_R": DENSE_ROWS, "BLOCK_M": block_m, "BLOCK_K": 64, "num_stages": 2}
    gate_dense[(ceil_div(batch, DENSE_ROWS), part.shape[0], ceil_div(units, block_m))](
        part, as_map(x), weight, batch, features, pixels, units, per_slice, **blocks, **FIXED_ORDER
    )
    return part
