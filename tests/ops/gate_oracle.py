"""The gate and the block's end in closed form, gradients derived by hand: the oracle of both operators.

Of the package it uses the operators' argument lists and the layout of a gradient; no arithmetic. Importing it gives
``gatedconv::gate`` and the other operators with Triton kernels a body on the CPU, so that schemas, fakes,
autograd formulas and compiled graphs can be tested without a GPU. The package has none there: its CPU code is the
reference.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from gatedconv.kernels.common import gradient_like

gate_op, residual_op = (importlib.import_module(f"gatedconv.ops.{name}") for name in ("gate", "gated_residual"))


def logistic(u):
    """Logistic noise of uniform u on [0, 1)."""
    u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
    return torch.log(u) - torch.log1p(-u)


def open_gates(z, estimator, noise, threshold):
    """Which logits (N, O) open their gate."""
    if estimator == "batch_mean":
        return z > threshold
    if noise is None or estimator == "ste":
        return z > 0
    return noise < torch.sigmoid(z) if estimator == "bernoulli" else z + logistic(noise) > 0


def through_estimator(d, z, estimator, noise, threshold, temperature):
    """Gradient d of a gate as the gradient of its logit."""
    if estimator == "bernoulli":
        return d * torch.sigmoid(z) * torch.sigmoid(-z)
    if estimator == "gumbel":
        s = torch.sigmoid((z if noise is None else z + logistic(noise)) / temperature)
        return d * s * (1 - s) / temperature
    return torch.where((z - threshold).abs() <= 1, d, 0)


def gate(*arguments):
    a = gate_op.ForwardArguments(*arguments)
    dtype, pooling = a.weight2.dtype, a.x.dim() == 4 and not a.flatten
    pooled = a.x.mean((2, 3), dtype=dtype) if pooling else a.weight2.new_empty(0)
    features = pooled if pooling else a.x.flatten(1).to(dtype)
    hidden, stat = a.weight2.new_empty(a.x.shape[0], 0), a.weight2.new_empty(3, 0)
    if a.weight1 is not None:
        hidden = F.linear(features, a.weight1, a.bias1)
        mean, var, unbiased = a.running_mean, a.running_var, a.running_var
        if a.batch_stats:
            mean, var, unbiased = hidden.mean(0), hidden.var(0, unbiased=False), hidden.var(0)
        stat = torch.stack([mean, (var + a.eps).rsqrt(), unbiased])
        features = torch.relu((hidden - mean) * stat[1] * a.norm_weight + a.norm_bias)
    logits = F.linear(features, a.weight2, a.bias2)
    threshold = torch.zeros_like(a.bias2)
    if a.estimator == "batch_mean":
        threshold = logits.mean(0) if a.train else a.running_threshold.clone()
    opened = open_gates(logits, a.estimator, a.noise, threshold).to(dtype)
    return opened.to(a.dtype, copy=True), opened.mean(0), logits, pooled, hidden, stat, threshold


def gate_backward(*arguments):
    a = gate_op.BackwardArguments(*arguments)
    dz = torch.zeros_like(a.logits)
    dz = dz if a.d_gate is None else dz + a.d_gate
    dz = dz if a.d_rate is None else dz + a.d_rate / dz.shape[0]
    dz = through_estimator(dz, a.logits, a.estimator, a.noise, a.threshold, a.temperature)
    if a.estimator == "batch_mean" and a.train:
        dz = dz - dz.mean(0)
    dz = dz if a.d_logits is None else dz + a.d_logits
    x, new = a.features.flatten(1).to(dz.dtype), dz.new_empty
    if a.weight1 is None:
        hidden, last, dx = [new(0, 0), new(0), new(0), new(0)], dz.t() @ x, dz @ a.weight2
    else:
        normed = (a.hidden - a.stat[0]) * a.stat[1]
        output = normed * a.norm_weight + a.norm_bias
        dy = torch.where(output <= 0, 0, dz @ a.weight2)  # NaN passes, as in PyTorch
        scale = a.norm_weight * a.stat[1]
        dh = dy * scale
        if a.batch_stats:
            dh = (dy - dy.mean(0) - normed * (dy * normed).mean(0)) * scale
        d_bias1 = torch.zeros_like(scale) if a.batch_stats else dh.sum(0)
        hidden = [dh.t() @ x, d_bias1, (dy * normed).sum(0), dy.sum(0)]
        last, dx = dz.t() @ torch.relu(output), dh @ a.weight1
    made = new(0)
    if a.need_dx:
        made = gradient_like(a.features, a.dtype).copy_((dx / a.pixels).view(a.features.shape))
    return made, *hidden, last, dz.sum(0)


def gated_residual(*arguments):
    a = residual_op.ResidualForwardArguments(*arguments)
    dtype, new = a.weight.dtype, a.weight.new_empty
    wide = a.x.to(dtype)
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
    stat = torch.stack([mean, (var + a.eps).rsqrt(), wide.var((0, 2, 3))])
    pooled = wide.mean((2, 3))
    factor = torch.ones_like(pooled) if a.layer is None else a.layer.to(dtype).expand_as(pooled)
    normed, *decision = [new(0) for _ in range(7)]
    if a.weight2 is not None:
        normed = (pooled - mean) * stat[1] * a.weight + a.bias
        opened, rate, logits, _, hidden, gate_stat, threshold = gate(normed, *a[5:15], False, a.gate_eps, *a[17:])
        decision = [opened, rate, logits, hidden, gate_stat, threshold]
        factor = factor * opened
    branch = (wide - mean[:, None, None]) * (stat[1] * a.weight)[:, None, None] + a.bias[:, None, None]
    out = torch.relu(a.shortcut + factor[:, :, None, None] * branch)
    out = gradient_like(a.x, torch.promote_types(a.x.dtype, a.shortcut.dtype)).copy_(out)
    return out, out.mean((2, 3), dtype=dtype), stat, pooled, normed, *decision


def gated_residual_backward(*arguments):
    a = residual_op.ResidualBackwardArguments(*arguments)
    dtype, new = a.weight.dtype, a.weight.new_empty
    pixels, count = a.x.shape[2] * a.x.shape[3], a.x.numel() // a.x.shape[1]
    grad = torch.zeros_like(a.out, dtype=dtype)
    grad = grad if a.d_out is None else grad + a.d_out
    grad = grad if a.d_pooled is None else grad + a.d_pooled[:, :, None, None] / pixels
    grad = torch.where(a.out <= 0, 0, grad)
    normal = (a.x.to(dtype) - a.stat[0][:, None, None]) * a.stat[1][:, None, None]
    through = a.weight * (grad * normal).sum((2, 3)) + a.bias * grad.sum((2, 3))
    factor = torch.ones_like(through) if a.layer is None else a.layer.to(dtype).expand_as(through)
    d_layer, d_normed, gates = new(0), 0, [new(0) for _ in range(6)]
    if a.layer is not None:
        d_layer = (through if a.weight2 is None else through * a.gate).sum(1, keepdim=True).to(a.layer.dtype)
    if a.weight2 is not None:
        incoming = (through * factor, a.d_rate, a.d_logits, a.normed, a.logits, a.hidden, a.gate_stat, a.threshold)
        weights = (a.weight1, a.norm_weight, a.norm_bias, a.weight2, a.noise)
        options = (a.estimator, a.temperature, a.train, a.batch_stats, dtype)
        d_normed, *gates = gate_backward(*incoming, *weights, 1, True, *options)
        d_normed, factor = d_normed[:, :, None, None] / pixels, factor * a.gate
    dy = factor[:, :, None, None] * grad + d_normed
    d_bias, d_weight = dy.sum((0, 2, 3)), (dy * normal).sum((0, 2, 3))
    dx = dy - d_bias[:, None, None] / count - normal * d_weight[:, None, None] / count
    dx = gradient_like(a.x, a.x.dtype).copy_((a.weight * a.stat[1])[:, None, None] * dx)
    d_shortcut = new(0) if a.shortcut_dtype is None else gradient_like(a.out, a.shortcut_dtype).copy_(grad)
    return dx, d_shortcut, d_layer, d_weight, d_bias, *gates


def gated_scale(x, gate):
    out = gradient_like(x, torch.promote_types(x.dtype, gate.dtype))
    return out.copy_(x * gate[:, :, None, None])


def gated_scale_backward(d_out, x, gate):
    d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dx = gradient_like(x, x.dtype).copy_(d_out * gate[:, :, None, None])
    return dx, d_gate.copy_((d_out * x).sum((2, 3)))


for body in (gate, gate_backward, gated_residual, gated_residual_backward, gated_scale, gated_scale_backward):
    torch.library.impl(f"gatedconv::{body.__name__}", "CPU", body)
