"""The gate: from a feature map to a binary decision per sample and gate (Table 2 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatedconv.ops._gate_args import (
    GateOptions,
    GateOutput,
    GateParameters,
    GateStatistics,
    check_gate,
    empty_decision,
    empty_gradients,
    kernels_support,
    require_batch,
)
from gatedconv.ops._registration import arguments_schema
from gatedconv.ops.estimate import estimate
from gatedconv.ops.global_average_pool import global_average_pool


def gate(
    x: Tensor, parameters: GateParameters, statistics: GateStatistics, options: GateOptions, noise: Tensor | None = None
) -> GateOutput:
    """Decide, per sample, which gates are open.

    features -> dense -> BatchNorm -> ReLU -> dense -> estimator; in 1FC the second dense layer is the only one.
    Runs as two kernels forward and two backward where Triton runs (CUDA, fp32 parameters), in PyTorch elsewhere.

    Args:
        x: (N, C, H, W), pooled over H and W or flattened; or features (N, K). fp16, bf16, fp32 or fp64.
        parameters: the layers, in fp32 or fp64, the dtype in which logits are computed, autocast or not.
        statistics: buffers, moved in place as `torch.nn.functional.batch_norm` moves them.
        options: how to decide.
        noise: (N, O), uniform on [0, 1), in the dtype of the parameters, for "gumbel" and "bernoulli"; None
            makes them deterministic.

    Returns:
        gate (N, O), exactly 0 or 1, in ``options.dtype``; open_rate (O,); logits (N, O).

    Raises:
        TypeError: a tensor is not floating point, or parameters differ in dtype.
        ValueError: shapes or devices do not fit, the estimator is unknown, or batch statistics of a single sample
            are needed.
    """
    check_gate(x, parameters, statistics, options, noise)
    if not kernels_support(x, parameters, statistics, options, noise):
        return compute_gate(x, parameters, statistics, options, noise)
    require_batch(x, parameters, options)
    if torch.compiler.is_compiling():
        return _compiled(x, parameters, statistics, options, noise)
    return GateOutput(*_Gate.apply(x, *parameters, noise, statistics, options))


def gate_reference(
    x: Tensor, parameters: GateParameters, statistics: GateStatistics, options: GateOptions, noise: Tensor | None = None
) -> GateOutput:
    """Compute `gate` from PyTorch's own differentiable functions."""
    check_gate(x, parameters, statistics, options, noise)
    return compute_gate(x, parameters, statistics, options, noise)


def compute_gate(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None,
    normalize: Callable[[Tensor], Tensor] | None = None,
) -> GateOutput:
    """`gate_reference` of checked arguments; ``normalize``, (N, H) -> (N, H), may take the place of the norm."""
    dtype = parameters.weight2.dtype
    with torch.autocast(device_type=x.device.type, enabled=False):
        # Half-precision logits would flip decisions near 0.
        if x.dim() == 4 and not options.flatten:
            hidden = global_average_pool(x, dtype)
        else:
            hidden = x.flatten(1).to(dtype)
        if parameters.weight1 is not None:
            hidden = F.linear(hidden, parameters.weight1, parameters.bias1)
            hidden = normalize(hidden) if normalize else _normalize(hidden, parameters, statistics, options)
            hidden = torch.relu(hidden)
        logits = F.linear(hidden, parameters.weight2, parameters.bias2)
        gate = estimate(
            logits,
            options.estimator,
            noise=noise,
            temperature=options.temperature,
            threshold=statistics.threshold,
            training=options.training,
            momentum=options.momentum,
        )
        # No samples have no rate: 0 keeps NaN out of the losses and of the running rate.
        open_rate = gate.mean(dim=0) if len(gate) else gate.sum(dim=0)
        if options.training and len(gate) and statistics.open_rate is not None:
            with torch.no_grad():
                statistics.open_rate.lerp_(open_rate.detach().to(statistics.open_rate.dtype), options.momentum)
    return GateOutput(gate.to(options.dtype or x.dtype), open_rate, logits)


def _normalize(hidden: Tensor, parameters: GateParameters, statistics: GateStatistics, options: GateOptions) -> Tensor:
    momentum = options.norm_momentum
    if options.batch_stats and statistics.batches is not None:
        statistics.batches.add_(1)
        momentum = 1 / float(statistics.batches) if momentum is None else momentum
    return F.batch_norm(
        hidden,
        statistics.mean,
        statistics.var,
        parameters.norm_weight,
        parameters.norm_bias,
        options.batch_stats,
        0.0 if momentum is None else momentum,
        options.eps,
    )


class ForwardArguments(NamedTuple):
    """The arguments of ``gatedconv::gate``; ``dtype`` is that of the gate."""

    x: Tensor
    weight1: Tensor | None
    bias1: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight2: Tensor
    bias2: Tensor
    noise: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    running_threshold: Tensor | None
    flatten: bool
    eps: float
    estimator: str
    temperature: float
    train: bool
    batch_stats: bool
    dtype: torch.dtype


class BackwardArguments(NamedTuple):
    """The arguments of ``gatedconv::gate_backward``; ``dtype`` is that of the gradient of features.

    features (N, C) may be the mean of ``pixels`` positions; then their gradient is that of one position.
    """

    d_gate: Tensor | None
    d_rate: Tensor | None
    d_logits: Tensor | None
    features: Tensor
    logits: Tensor
    hidden: Tensor
    stat: Tensor
    threshold: Tensor
    weight1: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight2: Tensor
    noise: Tensor | None
    pixels: int
    need_dx: bool
    estimator: str
    temperature: float
    train: bool
    batch_stats: bool
    dtype: torch.dtype


def _arguments(
    x: Tensor, parameters: GateParameters, noise: Tensor | None, s: GateStatistics, o: GateOptions
) -> ForwardArguments:
    numbers = (o.flatten, o.eps, o.estimator, o.temperature, o.training, o.batch_stats, o.dtype or x.dtype)
    flat: tuple[Any, ...] = (x, *parameters, noise, s.mean, s.var, s.threshold, *numbers)
    return ForwardArguments(*flat)


def _compiled(
    x: Tensor, parameters: GateParameters, statistics: GateStatistics, options: GateOptions, noise: Tensor | None
) -> GateOutput:
    """Compute `gate` through the operators; the buffers move here, in the graph."""
    arguments = _arguments(x, parameters, noise, statistics, options)
    gate, rate, logits, _, _, stat, threshold = torch.ops.gatedconv.gate.default(*arguments)
    move_buffers(statistics, options, rate, stat, threshold)
    return GateOutput(gate, rate, logits)


def move_buffers(
    statistics: GateStatistics, options: GateOptions, rate: Tensor, stat: Tensor, threshold: Tensor
) -> None:
    """Move the running buffers by what an operator computed."""
    with torch.no_grad():
        if options.training and statistics.open_rate is not None:
            statistics.open_rate.lerp_(rate.detach(), options.momentum)
        if options.training and options.estimator == "batch_mean" and statistics.threshold is not None:
            statistics.threshold.lerp_(threshold.detach(), options.momentum)
        if options.batch_stats and statistics.mean is not None and options.norm_momentum is not None:
            assert statistics.var is not None and statistics.batches is not None
            statistics.mean.lerp_(stat[0].detach(), options.norm_momentum)
            statistics.var.lerp_(stat[2].detach(), options.norm_momentum)
            statistics.batches.add_(1)


def _forward_kernels(*arguments: Any) -> tuple[Tensor, ...]:
    from gatedconv.kernels import gate as kernels

    a = ForwardArguments(*arguments)
    parameters = GateParameters(*a[1:7])
    running = GateStatistics(a.running_mean, a.running_var, threshold=a.running_threshold)
    options = GateOptions(a.estimator, a.temperature, a.flatten, a.train, a.batch_stats, a.eps)
    return tuple(kernels.forward(a.x, parameters, running, options, a.noise, dtype=a.dtype, update=False))


def _backward_kernels(*arguments: Any) -> tuple[Tensor, ...]:
    from gatedconv.kernels import gate as forward
    from gatedconv.kernels import gate_backward as kernels

    a = BackwardArguments(*arguments)
    d = kernels.GateGradients(a.d_gate, a.d_rate, a.d_logits)
    saved = forward.GateForward(None, None, a.logits, a.features, a.hidden, a.stat, a.threshold)
    parameters = GateParameters(a.weight1, None, a.norm_weight, a.norm_bias, a.weight2, None)  # type: ignore[arg-type]
    options = GateOptions(a.estimator, a.temperature, training=a.train, batch_stats=a.batch_stats)
    needs = {"need_dx": a.need_dx, "pixels": a.pixels, "dtype": a.dtype}
    return tuple(kernels.backward(d, a.features, saved, parameters, options, a.noise, **needs))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    a = ForwardArguments(*arguments)
    gate, rate, logits, *rest = empty_decision(a.weight1, a.weight2, a.x.shape[0], a.dtype)
    pooled = a.weight2.new_empty(a.x.shape[:2] if a.x.dim() == 4 and not a.flatten else (0,))
    return gate, rate, logits, pooled, *rest


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    from gatedconv.kernels.common import gradient_like

    a = BackwardArguments(*arguments)
    dx = gradient_like(a.features, a.dtype) if a.need_dx else a.weight2.new_empty(0)
    return dx, *empty_gradients(a.weight1, a.weight2)


def _save(ctx: Any, arguments: ForwardArguments, output: Sequence[Tensor]) -> None:
    """Save for backward; ``output`` is what the kernels return."""
    a, (_, _, logits, pooled, hidden, stat, threshold) = arguments, output
    pooling = a.x.dim() == 4 and not a.flatten
    weights = (a.weight1, a.norm_weight, a.norm_bias, a.weight2)
    ctx.save_for_backward(pooled if pooling else a.x, logits, hidden, stat, threshold, *weights, a.noise)
    ctx.shape, ctx.dtype = a.x.shape if pooling else None, a.x.dtype
    ctx.options = (a.estimator, a.temperature, a.train, a.batch_stats)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], backward: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the six parameters by ``backward``, which takes `BackwardArguments`."""
    if all(grad is None for grad in grads[:3]):
        return (None,) * 7
    pixels = 1 if ctx.shape is None else ctx.shape[2] * ctx.shape[3]
    need_dx: bool = ctx.needs_input_grad[0]
    flat: tuple[Any, ...] = (*grads[:3], *ctx.saved_tensors, pixels, need_dx, *ctx.options, ctx.dtype)
    arguments = BackwardArguments(*flat)
    dx, *rest = backward(*arguments)
    hidden = rest[:4] if arguments.weight1 is not None else (None,) * 4
    if not need_dx:
        return None, *hidden, *rest[4:]
    if ctx.shape is not None:
        dx = dx[:, :, None, None].expand(ctx.shape)  # the mean's gradient: no full-size tensor is written
    return dx, *hidden, *rest[4:]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        from gatedconv.kernels import gate as kernels

        parameters, (noise, statistics, o) = GateParameters(*rest[:6]), rest[6:]
        out = kernels.forward(x, parameters, statistics, o, noise, dtype=o.dtype or x.dtype, update=o.training)
        _save(ctx, _arguments(x, parameters, noise, statistics, o), out)
        return out.gate, out.rate, out.logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads, _backward_kernels), None, None, None


torch.library.define(
    "gatedconv::gate",
    f"({arguments_schema(ForwardArguments)}) -> (Tensor gate, Tensor rate, Tensor logits, Tensor pooled, "
    "Tensor hidden, Tensor stat, Tensor threshold)",
)
torch.library.define(  # gradients of x and of the six parameters
    "gatedconv::gate_backward", f"({arguments_schema(BackwardArguments)}) -> ({', '.join(['Tensor'] * 7)})"
)
torch.library.impl("gatedconv::gate", "CUDA", _forward_kernels)
torch.library.impl("gatedconv::gate_backward", "CUDA", _backward_kernels)
torch.library.register_fake("gatedconv::gate", _forward_fake)
torch.library.register_fake("gatedconv::gate_backward", _backward_fake)
torch.library.register_autograd(
    "gatedconv::gate",
    lambda ctx, *grads: (*_gradients(ctx, grads, torch.ops.gatedconv.gate_backward.default), *[None] * 11),
    setup_context=lambda ctx, inputs, output: _save(ctx, ForwardArguments(*inputs), output),
)
