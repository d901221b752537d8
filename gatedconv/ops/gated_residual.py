"""The end of a gated residual block in training: normalize, gate, add the shortcut, ReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatedconv._checks import require_map, require_tensor
from gatedconv.ops import _triton
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
from gatedconv.ops.gate import gate_reference, move_buffers


class NormArguments(NamedTuple):
    """A BatchNorm over (N, H, W) that uses the batch's statistics.

    weight (C,), bias (C,); mean (C,), var (C,) and batches int64 () move in place by ``momentum``.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    batches: Tensor
    eps: float = 1e-5
    momentum: float = 0.1


class InnerGate(NamedTuple):
    """The arguments of a channel gate that reads what it gates, pooled; see `gatedconv.ops.gate`."""

    parameters: GateParameters
    statistics: GateStatistics
    options: GateOptions
    noise: Tensor | None = None


class ResidualOutput(NamedTuple):
    """The output of a block.

    out (N, C, H, W); pooled (N, C), its mean over H and W in the norm's dtype, for the next block's gate;
    channel: the inner gate's decision, None without one. All are differentiable, except ``channel.gate`` where
    kernels run.
    """

    out: Tensor
    pooled: Tensor
    channel: GateOutput | None


def gated_residual(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None = None, channel: InnerGate | None = None
) -> ResidualOutput:
    """Compute out = ReLU(shortcut + layer * channel * BN(x)), the channel gate reading the pooled BN(x).

    Where Triton runs, BN(x) is never stored: beyond the inputs, backward keeps ``out`` and a few numbers per sample and
    channel. There no gradient goes through ``channel.gate`` itself: its effect is in ``out``.

    Args:
        x: (N, C, H, W), the branch's last convolution; fp16, bf16, fp32 or fp64.
        shortcut: (N, C, H, W).
        norm: the norm after that convolution.
        layer: (N, 1), the layer gate's decision, or None.
        channel: the channel gate, or None.

    Raises:
        TypeError: not floating point.
        ValueError: shapes or devices do not fit, or there is only one value per channel.
    """
    _check(x, shortcut, norm, layer, channel)
    if not _kernels_support(x, shortcut, norm, layer, channel):
        return gated_residual_reference(x, shortcut, norm, layer, channel)
    if channel is not None:
        require_batch(x, channel.parameters, channel.options)
    if torch.compiler.is_compiling():
        return _compiled(x, shortcut, norm, layer, channel)
    parameters = (None,) * 6 if channel is None else channel.parameters
    out, pooled, *decision = _GatedResidual.apply(
        x, shortcut, layer, norm.weight, norm.bias, *parameters, norm, channel
    )
    return ResidualOutput(out, pooled, GateOutput(*decision) if channel is not None else None)


def gated_residual_reference(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None = None, channel: InnerGate | None = None
) -> ResidualOutput:
    """Compute `gated_residual` from PyTorch's own differentiable functions."""
    _check(x, shortcut, norm, layer, channel)
    norm.batches.add_(1)
    branch = F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    decision = None
    if channel is not None:
        decision = gate_reference(branch, *channel)
        branch = branch * decision.gate[:, :, None, None]
    if layer is not None:
        branch = branch * layer[:, :, None, None]
    out = torch.relu(shortcut + branch)
    return ResidualOutput(out, out.mean(dim=(2, 3), dtype=norm.weight.dtype), decision)


def _check(x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None) -> None:
    require_map("gated_residual", x)
    per_channel = (x.shape[1],)
    named: list[tuple[str, Any, tuple[int, ...]]] = [("shortcut", shortcut, x.shape)]
    named += [] if layer is None else [("layer", layer, (x.shape[0], 1))]
    named += [(f"norm.{name}", getattr(norm, name), per_channel) for name in ("weight", "bias", "mean", "var")]
    for name, tensor, shape in named:
        require_tensor("gated_residual", name, tensor, shape, x.device)
    if channel is not None:
        gates = channel.parameters.weight2.shape[0]
        if gates != x.shape[1]:
            raise ValueError(f"gated_residual: channel must have {x.shape[1]} gates, one a channel of x, got {gates}")
        check_gate(x, *channel)


def _kernels_support(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None
) -> bool:
    maps = [x, shortcut] if layer is None else [x, shortcut, layer]
    if not _triton.kernels_run_on(x) or any(t.dtype not in _triton.KERNEL_DTYPES for t in maps):
        return False
    if x.numel() <= x.shape[1] or norm.batches.dtype != torch.int64:
        return False
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in norm[:4]):
        return False
    if channel is None:
        return True
    # A gate that reads every position needs BN(x) stored.
    return not channel.options.flatten and kernels_support(x, *channel)


class ResidualForwardArguments(NamedTuple):
    """The arguments of ``gatedconv::gated_residual``; those of the channel gate, from ``weight1`` on, may be None.

    ``dtype`` is that of the gate.
    """

    x: Tensor
    shortcut: Tensor
    layer: Tensor | None
    weight: Tensor
    bias: Tensor
    weight1: Tensor | None
    bias1: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None
    noise: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    running_threshold: Tensor | None
    eps: float
    gate_eps: float
    estimator: str
    temperature: float
    train: bool
    batch_stats: bool
    dtype: torch.dtype


class ResidualBackwardArguments(NamedTuple):
    """The arguments of ``gatedconv::gated_residual_backward``; ``shortcut_dtype`` is None if it needs no gradient."""

    d_out: Tensor | None
    d_pooled: Tensor | None
    d_rate: Tensor | None
    d_logits: Tensor | None
    x: Tensor
    out: Tensor
    stat: Tensor
    pooled: Tensor
    normed: Tensor
    gate: Tensor
    logits: Tensor
    hidden: Tensor
    gate_stat: Tensor
    threshold: Tensor
    layer: Tensor | None
    weight: Tensor
    bias: Tensor
    weight1: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight2: Tensor | None
    noise: Tensor | None
    shortcut_dtype: torch.dtype | None
    estimator: str
    temperature: float
    train: bool
    batch_stats: bool


class _Kept(NamedTuple):
    """The outputs of ``gatedconv::gated_residual``; those of the channel gate, from ``normed`` on, may be empty."""

    out: Tensor
    pooled_out: Tensor
    stat: Tensor
    pooled: Tensor
    normed: Tensor
    gate: Tensor
    rate: Tensor
    logits: Tensor
    hidden: Tensor
    gate_stat: Tensor
    threshold: Tensor


def _arguments(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None
) -> ResidualForwardArguments:
    first = (x, shortcut, layer, norm.weight, norm.bias)
    if channel is None:
        return ResidualForwardArguments(*first, *(None,) * 10, norm.eps, 0.0, "ste", 1.0, True, True, x.dtype)
    parameters, s, o, noise = channel
    numbers = (norm.eps, o.eps, o.estimator, o.temperature, o.training, o.batch_stats, o.dtype or x.dtype)
    flat: tuple[Any, ...] = (*first, *parameters, noise, s.mean, s.var, s.threshold, *numbers)
    return ResidualForwardArguments(*flat)


def _compiled(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None
) -> ResidualOutput:
    """Compute `gated_residual` through the operators; the buffers move here, in the graph."""
    arguments = _arguments(x, shortcut, norm, layer, channel)
    kept = _Kept(*torch.ops.gatedconv.gated_residual.default(*arguments))
    with torch.no_grad():
        norm.mean.lerp_(kept.stat[0].detach(), norm.momentum)
        norm.var.lerp_(kept.stat[2].detach(), norm.momentum)
        norm.batches.add_(1)
    if channel is None:
        return ResidualOutput(kept.out, kept.pooled_out, None)
    move_buffers(channel.statistics, channel.options, kept.rate, kept.gate_stat, kept.threshold)
    return ResidualOutput(kept.out, kept.pooled_out, GateOutput(kept.gate.detach(), kept.rate, kept.logits))


def _flat(kept: Any) -> _Kept:
    """The outputs of the operator, made of those of the kernels."""
    flat: tuple[Any, ...] = (*kept[:4], *(kept.stat.new_empty(0) for _ in range(7)))
    if kept.decision is not None:
        d = kept.decision
        flat = (*kept[:5], d.gate, d.rate, d.logits, d.hidden, d.stat, d.threshold)
    return _Kept(*flat)


def _forward_kernels(*arguments: Any) -> tuple[Tensor, ...]:
    from gatedconv.kernels import gated_residual as kernels

    a = ResidualForwardArguments(*arguments)
    norm = NormArguments(a.weight, a.bias, None, None, None, a.eps)  # type: ignore[arg-type]
    channel = None
    if a.weight2 is not None and a.bias2 is not None:
        parameters = GateParameters(a.weight1, a.bias1, a.norm_weight, a.norm_bias, a.weight2, a.bias2)
        statistics = GateStatistics(a.running_mean, a.running_var, threshold=a.running_threshold)
        options = GateOptions(a.estimator, a.temperature, False, a.train, a.batch_stats, a.gate_eps, dtype=a.dtype)
        channel = InnerGate(parameters, statistics, options, a.noise)
    return _flat(kernels.forward(a.x, a.shortcut, a.layer, norm, channel, update=False))


def _backward_kernels(*arguments: Any) -> tuple[Tensor, ...]:
    from gatedconv.kernels import gate
    from gatedconv.kernels import gated_residual as forward
    from gatedconv.kernels import gated_residual_backward as kernels

    a = ResidualBackwardArguments(*arguments)
    norm = NormArguments(a.weight, a.bias, None, None, None)  # type: ignore[arg-type]
    channel, decision = None, None
    if a.weight2 is not None:
        parameters = GateParameters(a.weight1, None, a.norm_weight, a.norm_bias, a.weight2, None)  # type: ignore[arg-type]
        options = GateOptions(a.estimator, a.temperature, training=a.train, batch_stats=a.batch_stats)
        channel = InnerGate(parameters, GateStatistics(), options, a.noise)
        decision = gate.GateForward(a.gate, None, a.logits, a.normed, a.hidden, a.gate_stat, a.threshold)
    saved = forward.ResidualForward(a.out, None, a.stat, a.pooled, a.normed, decision)
    grads = (a.d_out, a.d_pooled, (a.d_rate, a.d_logits))
    made = kernels.backward(*grads, a.x, saved, a.layer, norm, channel, shortcut_dtype=a.shortcut_dtype)
    return tuple(a.weight.new_empty(0) if grad is None else grad for grad in made)


def _forward_fake(*arguments: Any) -> _Kept:
    from gatedconv.kernels.common import gradient_like

    a = ResidualForwardArguments(*arguments)
    (batch, channels), new = a.x.shape[:2], a.weight.new_empty
    out = gradient_like(a.x, torch.promote_types(a.x.dtype, a.shortcut.dtype))
    first = (out, new(batch, channels), new(3, channels), new(batch, channels))
    if a.weight2 is None:
        return _Kept(*first, *(new(0) for _ in range(7)))
    return _Kept(*first, new(batch, channels), *empty_decision(a.weight1, a.weight2, batch, a.dtype))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    from gatedconv.kernels.common import gradient_like

    a = ResidualBackwardArguments(*arguments)
    new = a.weight.new_empty
    d_shortcut = new(0) if a.shortcut_dtype is None else gradient_like(a.out, a.shortcut_dtype)
    d_layer = new(0) if a.layer is None else torch.empty_like(a.layer, memory_format=torch.contiguous_format)
    first = (gradient_like(a.x, a.x.dtype), d_shortcut, d_layer, torch.empty_like(a.weight), torch.empty_like(a.weight))
    if a.weight2 is None:
        return *first, *(new(0) for _ in range(6))
    return *first, *empty_gradients(a.weight1, a.weight2)


def _save(ctx: Any, arguments: ResidualForwardArguments, kept: _Kept) -> None:
    a, k = arguments, kept
    decision = (k.gate, k.logits, k.hidden, k.gate_stat, k.threshold)
    gate = (a.weight1, a.norm_weight, a.norm_bias, a.weight2, a.noise)
    ctx.save_for_backward(a.x, k.out, k.stat, k.pooled, k.normed, *decision, a.layer, a.weight, a.bias, *gate)
    ctx.shortcut_dtype = a.shortcut.dtype
    ctx.options = (a.estimator, a.temperature, a.train, a.batch_stats)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], backward: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, shortcut, layer, weight, bias and the gate's six parameters.

    Args:
        ctx: the context that `_save` filled.
        grads: of out, pooled, open rate and logits.
        backward: takes `ResidualBackwardArguments`.
    """
    shortcut_dtype = ctx.shortcut_dtype if ctx.needs_input_grad[1] else None
    flat: tuple[Any, ...] = (*grads, *ctx.saved_tensors, shortcut_dtype, *ctx.options)
    arguments = ResidualBackwardArguments(*flat)
    dx, d_shortcut, d_layer, d_weight, d_bias, *gate = backward(*arguments)
    hidden = [None] * 4 if arguments.weight1 is None else gate[:4]
    last = [None] * 2 if arguments.weight2 is None else gate[4:]
    first = (dx, None if shortcut_dtype is None else d_shortcut, None if arguments.layer is None else d_layer)
    return *first, d_weight, d_bias, *hidden, *last


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor, layer: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        from gatedconv.kernels import gated_residual as kernels

        norm, channel = rest[-2:]
        kept = _flat(kernels.forward(x, shortcut, layer, norm, channel, update=True))
        _save(ctx, _arguments(x, shortcut, norm, layer, channel), kept)
        if channel is None:
            return kept.out, kept.pooled_out
        ctx.mark_non_differentiable(kept.gate)
        return kept.out, kept.pooled_out, kept.gate, kept.rate, kept.logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_out: Tensor | None,
        d_pooled: Tensor | None,
        _: Tensor | None = None,
        d_rate: Tensor | None = None,
        d_logits: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, (d_out, d_pooled, d_rate, d_logits), _backward_kernels), None, None


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d = _Kept(*grads)  # type: ignore[arg-type]
    wanted = (d.out, d.pooled_out, d.rate, d.logits)
    return *_gradients(ctx, wanted, torch.ops.gatedconv.gated_residual_backward.default), *[None] * 11


torch.library.define(
    "gatedconv::gated_residual", f"({arguments_schema(ResidualForwardArguments)}) -> ({arguments_schema(_Kept)})"
)
torch.library.define(  # gradients of x, shortcut, layer, weight, bias and of the gate's six parameters
    "gatedconv::gated_residual_backward",
    f"({arguments_schema(ResidualBackwardArguments)}) -> ({', '.join(['Tensor'] * 11)})",
)
torch.library.impl("gatedconv::gated_residual", "CUDA", _forward_kernels)
torch.library.impl("gatedconv::gated_residual_backward", "CUDA", _backward_kernels)
torch.library.register_fake("gatedconv::gated_residual", _forward_fake)
torch.library.register_fake("gatedconv::gated_residual_backward", _backward_fake)
torch.library.register_autograd(
    "gatedconv::gated_residual",
    _backward,
    setup_context=lambda ctx, inputs, output: _save(ctx, ResidualForwardArguments(*inputs), _Kept(*output)),
)
