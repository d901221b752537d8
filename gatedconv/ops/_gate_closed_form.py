"""The gate on a CPU as its registered operators compute it: forward, and gradients in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.ops.estimate import estimate, logistic_noise

__all__ = ["DTYPES", "backward", "forward"]

# What a schema can carry of a dtype.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def forward(
    x: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    noise: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_threshold: Tensor | None,
    flatten: bool,
    eps: float,
    estimator: str,
    temperature: float,
    train: bool,
    batch_stats: bool,
    dtype: int,
) -> tuple[Tensor, ...]:
    """Gate, open rate, logits, pooled, hidden, statistics (3, H) and threshold of ``gate_forward``."""
    parameter_type = weight2.dtype
    pooling = x.dim() == 4 and not flatten
    pooled = x.mean((2, 3), dtype=parameter_type) if pooling else weight2.new_empty(0)
    features = pooled if pooling else x.flatten(1).to(parameter_type)
    hidden, stat = weight2.new_empty(x.shape[0], 0), weight2.new_empty(3, 0)
    if weight1 is not None and norm_weight is not None and norm_bias is not None:
        hidden = F.linear(features, weight1, bias1)
        mean, var, unbiased = running_mean, running_var, running_var
        if batch_stats:
            mean, var, unbiased = hidden.mean(0), hidden.var(0, unbiased=False), hidden.var(0)
        assert mean is not None and var is not None and unbiased is not None
        stat = torch.stack([mean, (var + eps).rsqrt(), unbiased])
        features = torch.relu((hidden - mean) * stat[1] * norm_weight + norm_bias)
    logits = F.linear(features, weight2, bias2)
    threshold = torch.zeros_like(bias2)
    if estimator == "batch_mean" and train:
        threshold = logits.mean(0)
    elif estimator == "batch_mean" and running_threshold is not None:
        threshold = running_threshold.clone()
    gate = estimate(logits, estimator, noise=noise, temperature=temperature, threshold=threshold)
    return gate.to(DTYPES[dtype]), gate.mean(0), logits, pooled, hidden, stat, threshold


def backward(
    d_gate: Tensor | None,
    d_rate: Tensor | None,
    d_logits: Tensor | None,
    features: Tensor,
    logits: Tensor,
    hidden: Tensor,
    stat: Tensor,
    threshold: Tensor,
    weight1: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight2: Tensor,
    noise: Tensor | None,
    pixels: int,
    need_dx: bool,
    estimator: str,
    temperature: float,
    train: bool,
    batch_stats: bool,
    dtype: int,
) -> list[Tensor]:
    """Gradients of features, weight1, bias1, norm_weight, norm_bias, weight2, bias2; empty if none."""
    dz = torch.zeros_like(logits)
    if d_gate is not None:
        dz = dz + d_gate
    if d_rate is not None:
        dz = dz + d_rate / logits.shape[0]
    dz = _through_estimator(dz, logits, noise, threshold, estimator, temperature)
    if estimator == "batch_mean" and train:
        dz = dz - dz.mean(0)
    if d_logits is not None:
        dz = dz + d_logits
    x = features.flatten(1).to(logits.dtype)
    if weight1 is None or norm_weight is None or norm_bias is None:
        nothing = [logits.new_empty(0) for _ in range(3)]
        dx = _laid_out(dz @ weight2 / pixels, features, dtype, need_dx)
        return [dx, logits.new_empty(0, 0), *nothing, dz.t() @ x, dz.sum(0)]
    normed = (hidden - stat[0]) * stat[1]
    output = normed * norm_weight + norm_bias
    dy = torch.where(output <= 0, 0, dz @ weight2)  # NaN passes, as in PyTorch
    d_gamma, d_beta = (dy * normed).sum(0), dy.sum(0)
    scale = norm_weight * stat[1]
    dh = (dy - dy.mean(0) - normed * (dy * normed).mean(0)) * scale if batch_stats else dy * scale
    d_bias1 = torch.zeros_like(d_beta) if batch_stats else d_beta * scale
    dx = _laid_out(dh @ weight1 / pixels, features, dtype, need_dx)
    return [dx, dh.t() @ x, d_bias1, d_gamma, d_beta, dz.t() @ torch.relu(output), dz.sum(0)]


def _laid_out(dx: Tensor, features: Tensor, dtype: int, needed: bool) -> Tensor:
    """The gradient in the order of strides that kernels give it; empty where it is not needed."""
    from gatedconv.kernels.launch import gradient_like

    return gradient_like(features, DTYPES[dtype]).copy_(dx.view(features.shape)) if needed else dx.new_empty(0)


def _through_estimator(
    dz: Tensor, logits: Tensor, noise: Tensor | None, threshold: Tensor, estimator: str, temperature: float
) -> Tensor:
    if estimator == "bernoulli":
        p = torch.sigmoid(logits)
        return dz * (p * (1 - p))
    if estimator == "gumbel":
        noisy = logits if noise is None else logits + logistic_noise(noise)
        s = torch.sigmoid(noisy / temperature)
        return dz * (s * (1 - s) / temperature)
    return torch.where((logits - threshold).abs() <= 1, dz, 0)
