"""The gate as two registered operators, ``gatedconv::gate_forward`` and ``gatedconv::gate_backward``.

They are what a compiled graph sees: functional, with outputs of their own, shapes known beforehand. Eager
code does not come here: autograd through the dispatcher costs several times what a Function costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.ops._gate_arguments import GateOptions, GateOutput, GateParameters, GateStatistics
from gatedconv.ops.estimate import estimate

__all__ = ["compiled_gate"]

_OPTIONS = "str estimator, float temperature, bool train, bool batch_stats, int dtype"

torch.library.define(
    "gatedconv::gate_forward",
    "(Tensor x, Tensor? weight1, Tensor? bias1, Tensor? norm_weight, Tensor? norm_bias, Tensor weight2, "
    "Tensor bias2, Tensor? noise, Tensor? running_mean, Tensor? running_var, Tensor? running_threshold, "
    f"bool flatten, float eps, {_OPTIONS}) -> (Tensor gate, Tensor rate, Tensor logits, Tensor pooled, "
    "Tensor hidden, Tensor stat, Tensor threshold)",
)
torch.library.define(
    "gatedconv::gate_backward",
    "(Tensor? d_gate, Tensor? d_rate, Tensor? d_logits, Tensor features, Tensor logits, Tensor hidden, "
    "Tensor stat, Tensor threshold, Tensor? weight1, Tensor? norm_weight, Tensor? norm_bias, Tensor weight2, "
    f"Tensor? noise, int pixels, bool need_dx, {_OPTIONS}) -> Tensor[]",
)

# What a schema can carry of a dtype.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compiled_gate(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None,
) -> GateOutput:
    """Compute `gate` through the operators; the buffers move here, in the graph."""
    gate, rate, logits, _, _, stat, threshold = torch.ops.gatedconv.gate_forward.default(
        x,
        *parameters,
        noise,
        statistics.mean,
        statistics.var,
        statistics.threshold,
        options.flatten,
        options.eps,
        options.estimator,
        options.temperature,
        options.training,
        options.batch_stats,
        _DTYPES.index(options.dtype or x.dtype),
    )
    with torch.no_grad():
        if options.training and statistics.open_rate is not None:
            statistics.open_rate.lerp_(rate.detach(), options.momentum)
        if options.training and statistics.threshold is not None:
            statistics.threshold.lerp_(threshold.detach(), options.momentum)
        if options.batch_stats and statistics.mean is not None and options.norm_momentum is not None:
            assert statistics.var is not None and statistics.batches is not None
            statistics.mean.lerp_(stat[0].detach(), options.norm_momentum)
            statistics.var.lerp_(stat[2].detach(), options.norm_momentum)
            statistics.batches.add_(1)
    return GateOutput(gate, rate, logits)


@torch.library.impl("gatedconv::gate_forward", "CUDA")
def _forward_cuda(
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
    from gatedconv.kernels import gate_launch

    running = gate_launch.Running(running_mean, running_var, None, None, running_threshold)
    return tuple(
        gate_launch.forward(
            x,
            weight1,
            bias1,
            norm_weight,
            norm_bias,
            weight2,
            bias2,
            noise,
            running,
            estimator=estimator,
            temperature=temperature,
            train=train,
            batch_stats=batch_stats,
            update=False,
            flatten=flatten,
            eps=eps,
            norm_momentum=0.0,
            momentum=0.0,
            dtype=_DTYPES[dtype],
        )
    )


@torch.library.impl("gatedconv::gate_backward", "CUDA")
def _backward_cuda(
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
    from gatedconv.kernels import gate_launch

    saved = gate_launch.GateForward(logits, logits, logits, features, hidden, stat, threshold)
    return list(
        gate_launch.backward(
            d_gate,
            d_rate,
            d_logits,
            features,
            saved,
            weight1,
            norm_weight,
            norm_bias,
            weight2,
            noise,
            estimator=estimator,
            temperature=temperature,
            train=train,
            batch_stats=batch_stats,
            need_dx=need_dx,
            pixels=pixels,
            dtype=_DTYPES[dtype],
        )
    )


@torch.library.impl("gatedconv::gate_forward", "CPU")
def _forward_cpu(
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
    return gate.to(_DTYPES[dtype]), gate.mean(0), logits, pooled, hidden, stat, threshold


@torch.library.impl("gatedconv::gate_backward", "CPU")
def _backward_cpu(
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
    dz = torch.zeros_like(logits)
    if d_gate is not None:
        dz = dz + d_gate
    if d_rate is not None:
        dz = dz + d_rate / logits.shape[0]
    dz = dz * _slope(logits, noise, threshold, estimator, temperature)
    if estimator == "batch_mean" and train:
        dz = dz - dz.mean(0)
    if d_logits is not None:
        dz = dz + d_logits
    x = features.flatten(1).to(logits.dtype)
    if weight1 is None or norm_weight is None or norm_bias is None:
        nothing = [logits.new_empty(0) for _ in range(3)]
        dx = (dz @ weight2 / pixels).view(features.shape).to(_DTYPES[dtype])
        return [dx, logits.new_empty(0, 0), *nothing, dz.t() @ x, dz.sum(0)]
    normed = (hidden - stat[0]) * stat[1]
    output = normed * norm_weight + norm_bias
    dy = torch.where(output > 0, dz @ weight2, 0)
    d_gamma, d_beta = (dy * normed).sum(0), dy.sum(0)
    scale = norm_weight * stat[1]
    dh = (dy - dy.mean(0) - normed * (dy * normed).mean(0)) * scale if batch_stats else dy * scale
    d_bias1 = torch.zeros_like(d_beta) if batch_stats else d_beta * scale
    dx = (dh @ weight1 / pixels).view(features.shape).to(_DTYPES[dtype])
    return [dx, dh.t() @ x, d_bias1, d_gamma, d_beta, dz.t() @ torch.relu(output), dz.sum(0)]


def _slope(
    logits: Tensor, noise: Tensor | None, threshold: Tensor, estimator: str, temperature: float
) -> Tensor:
    if estimator == "bernoulli":
        p = torch.sigmoid(logits)
        return p * (1 - p)
    if estimator == "gumbel":
        noisy = logits if noise is None else logits + torch.log(noise) - torch.log1p(-noise)
        s = torch.sigmoid(noisy / temperature)
        return s * (1 - s) / temperature
    return ((logits - threshold).abs() <= 1).to(logits.dtype)


@torch.library.register_fake("gatedconv::gate_forward")
def _forward_fake(
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
    batch, gates, hidden = x.shape[0], weight2.shape[0], 0 if weight1 is None else weight1.shape[0]
    pooled = (batch, x.shape[1]) if x.dim() == 4 and not flatten else (0,)
    return (
        weight2.new_empty((batch, gates), dtype=_DTYPES[dtype]),
        weight2.new_empty(gates),
        weight2.new_empty(batch, gates),
        weight2.new_empty(pooled),
        weight2.new_empty(batch, hidden),
        weight2.new_empty(3, hidden),
        weight2.new_empty(gates),
    )


@torch.library.register_fake("gatedconv::gate_backward")
def _backward_fake(
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
    gates, inner = weight2.shape
    units = 0 if weight1 is None else weight1.shape[0]
    d_weight1 = (0, 0) if weight1 is None else tuple(weight1.shape)
    new = weight2.new_empty
    dx = features.new_empty(features.shape, dtype=_DTYPES[dtype])
    return [dx, new(d_weight1), new(units), new(units), new(units), new(gates, inner), new(gates)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight1, _, norm_weight, norm_bias, weight2, _, noise = inputs[:8]
    flatten, _, *options = inputs[11:]
    _, _, logits, pooled, hidden, stat, threshold = output
    pooling = x.dim() == 4 and not flatten
    ctx.save_for_backward(
        pooled if pooling else x,
        logits,
        hidden,
        stat,
        threshold,
        weight1,
        norm_weight,
        norm_bias,
        weight2,
        noise,
    )
    ctx.shape, ctx.dtype, ctx.options = x.shape if pooling else None, x.dtype, options[:-1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> Sequence[Tensor | None]:
    pixels = 1 if ctx.shape is None else ctx.shape[2] * ctx.shape[3]
    dx, *rest = torch.ops.gatedconv.gate_backward.default(
        *grads[:3],
        *ctx.saved_tensors,
        pixels,
        ctx.needs_input_grad[0],
        *ctx.options,
        _DTYPES.index(ctx.dtype),
    )
    if ctx.shape is not None:
        dx = dx[:, :, None, None].expand(ctx.shape)
    hidden = rest[:4] if ctx.saved_tensors[5] is not None else [None] * 4
    return dx, *hidden, *rest[4:], *[None] * 11


torch.library.register_autograd("gatedconv::gate_forward", _backward, setup_context=_setup)
