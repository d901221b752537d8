"""A gate's backward in two launches; shapes, number formats and the order of sums as in ``gate``.

``gate_backward_rows`` (``gate_backward_logits`` where there is no hidden layer), then ``gate_backward_dense``. The
first launch writes batch sums per row tile (T partial rows); each program of the second adds up the T rows.

CENTER: the threshold was the batch mean of the logits, so the gradient of a logit is dz - mean(dz). At the hidden layer
the mean is a vector to subtract, mean(dz) @ weight2, which is another sum over row tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .common import FIXED_ORDER, ceil_div, gradient_like, norm_terms, relu
from .gate import GateForward, logistic_noise, tail_tiles
from .gate_backward_dense import HiddenLayer, backward_dense

SUMS = 5  # rows of ``sums``: see gate_backward_rows


class GateGradients(NamedTuple):
    """Gradients of the outputs of a gate: gate (N, O), rate (O,), logits (N, O); None where there is none."""

    gate: Tensor | None
    rate: Tensor | None
    logits: Tensor | None


class Decision(NamedTuple):
    """Inputs of the gradient of the logits: d_gate, d_logits, logits and noise (N, O); d_rate and threshold (O,)."""

    d_gate: Tensor | None
    d_rate: Tensor | None
    d_logits: Tensor | None
    logits: Tensor
    threshold: Tensor
    noise: Tensor | None
    temperature: float


class RowGradients(NamedTuple):
    """Outputs of gate_backward_rows: da (N, H), sums (5, T, H), weight2 (O, H), bias2 (O,)."""

    da: Tensor
    sums: Tensor
    weight2: Tensor
    bias2: Tensor


@triton.jit
def through_estimator(d, z, u, threshold, temperature, ESTIMATOR):
    """Gradient d of a gate as the gradient of its logit z; noise u or None."""
    if ESTIMATOR == "bernoulli":
        p = tl.sigmoid(z)
        result = d * (p * (1.0 - p))
    elif ESTIMATOR == "gumbel":
        if u is not None:
            z += logistic_noise(u)
        s = tl.sigmoid(z / temperature)
        result = d * (s * (1.0 - s) / temperature)
    else:
        # Eq. 4, ends included. Outside of the window the gradient is 0, whatever d is.
        result = tl.where(tl.abs(z - threshold) <= 1.0, d, 0.0)
    return result


@triton.jit
def gate_gradient(decision, rows, o, mask, N, O, ESTIMATOR):
    """Gradient of the logits through gates and open rates."""
    at = rows[:, None] * O + o[None, :]
    result = tl.zeros(mask.shape, tl.float32)
    if decision.d_gate is not None or decision.d_rate is not None:
        if decision.d_gate is not None:
            result += tl.load(decision.d_gate + at, mask=mask, other=0.0).to(tl.float32)
        if decision.d_rate is not None:
            result += tl.load(decision.d_rate + o, mask=o < O, other=0.0)[None, :] / N
        z = tl.load(decision.logits + at, mask=mask, other=0.0)
        u = None
        if decision.noise is not None:
            u = tl.load(decision.noise + at, mask=mask, other=0.5)
        threshold = tl.load(decision.threshold + o, mask=o < O, other=0.0)
        result = through_estimator(result, z, u, threshold[None, :], decision.temperature, ESTIMATOR)
    return tl.where(mask, result, 0.0)


@triton.jit
def own_gradient(decision, rows, o, mask, O):
    """Gradient that arrives at the logits themselves."""
    result = tl.zeros(mask.shape, tl.float32)
    if decision.d_logits is not None:
        result += tl.load(decision.d_logits + rows[:, None] * O + o[None, :], mask=mask, other=0.0)
    return result


@triton.jit
def center_of_tile(decision, o, N, O, ESTIMATOR, CENTER, BLOCK_N, BLOCK_O):
    """CENTER: the mean over the batch of the gradient through the gates of a tile; else 0."""
    mean = tl.zeros((BLOCK_O,), tl.float32)
    if CENTER:
        for start in range(0, N, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            mask = (rows < N)[:, None] & (o < O)[None, :]
            mean += tl.sum(gate_gradient(decision, rows, o, mask, N, O, ESTIMATOR), 0)
    return mean / N


@triton.jit
def gate_backward_logits(
    dz_ptr, d_bias2_ptr, decision, N, O, ESTIMATOR: constexpr, CENTER: constexpr, BLOCK_N: constexpr, BLOCK_O: constexpr
):
    """Write dz (N, O) and d bias2 (O,). Grid (O tiles,)."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    center = center_of_tile(decision, o, N, O, ESTIMATOR, CENTER, BLOCK_N, BLOCK_O)
    d_bias = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (o < O)[None, :]
        dz = gate_gradient(decision, rows, o, mask, N, O, ESTIMATOR) + own_gradient(decision, rows, o, mask, O)
        dz = tl.where(mask, dz - center[None, :], 0.0)
        tl.store(dz_ptr + rows[:, None] * O + o[None, :], dz, mask=mask)
        d_bias += tl.sum(dz, 0)
    tl.store(d_bias2_ptr + o, d_bias, mask=o < O)


@triton.jit
def gate_backward_rows(
    out,
    decision,
    layer,
    weight2_ptr,
    N,
    H,
    O,
    T,
    ESTIMATOR: constexpr,
    CENTER: constexpr,
    BLOCK_N: constexpr,
    BLOCK_H: constexpr,
    BLOCK_O: constexpr,
):
    """Write da (N, H), sums (5, T, H), d weight2 (O, H), d bias2 (O,). Grid (T row tiles + O tiles,).

    sums: of da past the ReLU, and times the normed hidden layer; with CENTER also of dz @ weight2, and of ones past
    the ReLU, and times the normed hidden layer.
    """
    i = tl.program_id(0)
    if i < T:
        rows_of_hidden(i, out, decision, layer, weight2_ptr, N, H, O, T, ESTIMATOR, CENTER, BLOCK_N, BLOCK_H, BLOCK_O)
    else:
        weights_of_gates(i - T, out, decision, layer, N, H, O, ESTIMATOR, CENTER, BLOCK_N, BLOCK_H, BLOCK_O)


@triton.jit
def rows_of_hidden(tile, out, decision, layer, weight2_ptr, N, H, O, T, ESTIMATOR, CENTER, BLOCK_N, BLOCK_H, BLOCK_O):
    """One row tile: da = dz @ weight2, neither centered nor masked by the ReLU, and its part of the sums."""
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_H)
    in_h = j < H
    mask_h = (rows < N)[:, None] & in_h[None, :]
    da = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    center = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, O, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        mask = (rows < N)[:, None] & (o < O)[None, :]
        at = weight2_ptr + o[:, None] * H + j[None, :]
        weight2 = tl.load(at, mask=(o < O)[:, None] & in_h[None, :], other=0.0)
        dz = gate_gradient(decision, rows, o, mask, N, O, ESTIMATOR)
        if CENTER:
            center += tl.sum(tl.sum(dz, 0)[:, None] * weight2, 0)
        dz += own_gradient(decision, rows, o, mask, O)
        da = tl.dot(dz, weight2, da, input_precision="ieee")
    tl.store(out.da + rows[:, None] * H + j[None, :], da, mask=mask_h)
    mean, rstd, gamma, beta = norm_terms(layer, j, H)
    h = tl.load(layer.hidden + rows[:, None] * H + j[None, :], mask=mask_h, other=0.0)
    normed = tl.where(mask_h, (h - mean[None, :]) * rstd[None, :], 0.0)
    blocked = (normed * gamma[None, :] + beta[None, :] <= 0.0) | ~mask_h  # NaN passes the ReLU, as in PyTorch
    da = tl.where(blocked, 0.0, da)
    at = out.sums + tile * H + j
    tl.store(at, tl.sum(da, 0), mask=in_h)
    tl.store(at + T * H, tl.sum(da * normed, 0), mask=in_h)
    if CENTER:
        passed = tl.where(blocked, 0.0, 1.0)
        tl.store(at + 2 * T * H, center, mask=in_h)
        tl.store(at + 3 * T * H, tl.sum(passed, 0), mask=in_h)
        tl.store(at + 4 * T * H, tl.sum(passed * normed, 0), mask=in_h)


@triton.jit
def weights_of_gates(tile, out, decision, layer, N, H, O, ESTIMATOR, CENTER, BLOCK_N, BLOCK_H, BLOCK_O):
    """The second dense layer's gradients for one tile of gates."""
    j = tl.arange(0, BLOCK_H)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    in_h, in_o = j < H, o < O
    center = center_of_tile(decision, o, N, O, ESTIMATOR, CENTER, BLOCK_N, BLOCK_O)
    mean, rstd, gamma, beta = norm_terms(layer, j, H)
    d_weight2 = tl.zeros((BLOCK_O, BLOCK_H), tl.float32)
    d_bias2 = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & in_o[None, :]
        mask_h = (rows < N)[:, None] & in_h[None, :]
        dz = gate_gradient(decision, rows, o, mask, N, O, ESTIMATOR) + own_gradient(decision, rows, o, mask, O)
        dz = tl.where(mask, dz - center[None, :], 0.0)
        h = tl.load(layer.hidden + rows[:, None] * H + j[None, :], mask=mask_h, other=0.0)
        a = relu((h - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :])
        d_weight2 = tl.dot(tl.trans(dz), tl.where(mask_h, a, 0.0), d_weight2, input_precision="ieee")
        d_bias2 += tl.sum(dz, 0)
    tl.store(out.weight2 + o[:, None] * H + j[None, :], d_weight2, mask=in_o[:, None] & in_h[None, :])
    tl.store(out.bias2 + o, d_bias2, mask=in_o)


def backward(
    d: GateGradients,
    features: Tensor,
    saved: GateForward,
    parameters: Any,
    options: Any,
    noise: Tensor | None,
    *,
    need_dx: bool,
    pixels: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of features, weight1, bias1, norm_weight, norm_bias, weight2, bias2; empty where there is none.

    Args:
        d: gradients of the outputs.
        features: (N, K), or the map (N, C, H, W) that was flattened.
        saved: what the forward computed; its gate and rate are not read.
        parameters: as in the forward; the biases of the dense layers are not read.
        options: as in the forward.
        noise: as in the forward.
        need_dx: whether the gradient of features is needed; it has the layout of `gradient_like`.
        pixels: where features (N, C) are the mean of so many positions, the gradient is that of one position.
        dtype: of the gradient of features; None for that of features.
    """
    (gates, _), (batch, hidden) = parameters.weight2.shape, saved.hidden.shape
    new: dict[str, Any] = {"device": saved.logits.device, "dtype": torch.float32}
    incoming = [None if t is None else t.contiguous() for t in (*d, noise)]
    decision = Decision(*incoming[:3], saved.logits, saved.threshold, incoming[3], options.temperature)
    center = options.estimator == "batch_mean" and options.training and not (d.gate is None and d.rate is None)
    flags = {"ESTIMATOR": options.estimator, "CENTER": center, **FIXED_ORDER}
    layer, sums, d_bias2 = None, None, torch.empty(gates, **new)
    with torch.cuda.device_of(features):
        if parameters.weight1 is None:
            d_first = torch.empty(batch, gates, **new)
            gate_backward_logits[(ceil_div(gates, 16),)](
                d_first, d_bias2, decision, batch, gates, **flags, BLOCK_N=64, BLOCK_O=16
            )
        else:
            layer = HiddenLayer(saved.hidden, saved.stat, parameters.norm_weight, parameters.norm_bias)
            tiles = tail_tiles(hidden)
            row_tiles = ceil_div(batch, tiles["BLOCK_N"])
            d_first, sums = torch.empty(batch, hidden, **new), torch.empty(SUMS, row_tiles, hidden, **new)
            out = RowGradients(d_first, sums, torch.empty(gates, hidden, **new), d_bias2)
            gate_backward_rows[(row_tiles + ceil_div(gates, tiles["BLOCK_O"]),)](
                out, decision, layer, parameters.weight2, batch, hidden, gates, row_tiles, **flags, **tiles
            )
        dx = gradient_like(features, dtype) if need_dx else None
        weight = parameters.weight2 if layer is None else parameters.weight1
        flags = {"BATCH_STATS": options.batch_stats, "CENTER": center, **FIXED_ORDER}
        first = backward_dense(dx, d_first, sums, layer, features, weight, 1 / pixels, flags)
    dx = torch.empty(0, **new) if dx is None else dx
    if layer is None:
        return dx, torch.empty(0, 0, **new), *first[1:], first.weight, d_bias2
    return dx, *first, out.weight2, d_bias2
