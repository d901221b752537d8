"""A block's end on a CPU as its registered operators compute it: forward, and gradients in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatedconv.ops import _gate_closed_form as gate_form
from gatedconv.ops._gate_closed_form import DTYPES

__all__ = ["backward", "forward"]


def forward(
    x: Tensor, shortcut: Tensor, layer: Tensor | None, weight: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """What the schema of ``gatedconv::gated_residual`` lists."""
    from gatedconv.kernels.launch import gradient_like

    eps, gate_eps, *options = arguments[10:]
    parameters, running = arguments[:6], arguments[6:10]
    wide = x.to(weight.dtype)
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
    stat = torch.stack([mean, (var + eps).rsqrt(), wide.var((0, 2, 3))])
    pooled = wide.mean((2, 3))
    factor = torch.ones_like(pooled) if layer is None else layer.to(weight.dtype).expand_as(pooled)
    normed, *decision = [weight.new_empty(0) for _ in range(7)]
    if parameters[4] is not None:
        normed = (pooled - mean) * stat[1] * weight + bias
        inner: list[Any] = [normed, *parameters, *running, False, gate_eps, *options]
        gate, rate, logits, _, hidden, gate_stat, threshold = gate_form.forward(*inner)
        decision = [gate, rate, logits, hidden, gate_stat, threshold]
        factor = factor * gate
    branch = _channels(stat[1] * weight) * (wide - _channels(mean)) + _channels(bias)
    out = torch.relu(shortcut + factor[:, :, None, None] * branch)
    kept = gradient_like(x, torch.promote_types(x.dtype, shortcut.dtype)).copy_(out)
    return kept, kept.mean((2, 3), dtype=weight.dtype), stat, pooled, normed, *decision


def backward(*arguments: Any) -> list[Tensor]:
    """Gradients of x, shortcut, layer, weight, bias and the gate's six parameters; empty if none."""
    from gatedconv.kernels.launch import gradient_like

    d_out, d_pooled, d_rate, d_logits, x, out, stat, _, normed, gate, *rest = arguments
    logits, hidden, gate_stat, threshold, layer, weight, bias, *rest = rest
    weight1, norm_weight, norm_bias, weight2, noise, shortcut_dtype, *options = rest
    pixels, count = x.shape[2] * x.shape[3], x.numel() // x.shape[1]
    grad = torch.zeros_like(out, dtype=weight.dtype)
    if d_out is not None:
        grad = grad + d_out
    if d_pooled is not None:
        grad = grad + d_pooled[:, :, None, None] / pixels
    grad = torch.where(out <= 0, 0, grad)
    normal = (x.to(weight.dtype) - _channels(stat[0])) * _channels(stat[1])
    through = weight * (grad * normal).sum((2, 3)) + bias * grad.sum((2, 3))
    factor = torch.ones_like(through) if layer is None else layer.to(weight.dtype).expand_as(through)
    d_layer, dy, grads = weight.new_empty(0), grad, [weight.new_empty(0) for _ in range(6)]
    if layer is not None:
        d_layer = (through if weight2 is None else through * gate).sum(1, keepdim=True).to(layer.dtype)
    if weight2 is not None:
        inner: list[Any] = [
            through * factor, d_rate, d_logits, normed, logits, hidden, gate_stat, threshold, weight1, norm_weight,
            norm_bias, weight2, noise, 1, True, *options[:-1], DTYPES.index(weight.dtype),
        ]  # fmt: skip
        d_normed, *grads = gate_form.backward(*inner)
        factor = factor * gate
        dy = factor[:, :, None, None] * grad + d_normed[:, :, None, None] / pixels
    else:
        dy = factor[:, :, None, None] * grad
    d_bias, d_weight = dy.sum((0, 2, 3)), (dy * normal).sum((0, 2, 3))
    dx = _channels(weight * stat[1]) * (dy - _channels(d_bias) / count - normal * _channels(d_weight) / count)
    d_shortcut = gradient_like(out, DTYPES[shortcut_dtype]).copy_(grad)
    return [gradient_like(x, x.dtype).copy_(dx), d_shortcut, d_layer, d_weight, d_bias, *grads]


def _channels(values: Tensor) -> Tensor:
    """Values (C,) beside a map (N, C, H, W)."""
    return values[:, None, None]
