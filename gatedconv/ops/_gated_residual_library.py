"""A block's end as two registered operators, ``gatedconv::gated_residual`` and ``gatedconv::gated_residual_backward``.

They are what a compiled graph sees, as in ``_gate_library``: functional, the running buffers move in the graph. An
inner channel gate is part of them; where there is none its tensors are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedconv.ops import _gated_residual_closed_form as closed_form
from gatedconv.ops._gate_arguments import GateOutput
from gatedconv.ops._gate_closed_form import DTYPES
from gatedconv.ops._gate_library import move_buffers
from gatedconv.ops._residual_arguments import InnerGate, NormArguments, ResidualOutput

__all__ = ["compiled_residual"]

_GATE = "str estimator, float temperature, bool train, bool batch_stats, int dtype"
_PARAMETERS = "Tensor? weight1, Tensor? bias1, Tensor? norm_weight, Tensor? norm_bias, Tensor? weight2, Tensor? bias2"

torch.library.define(
    "gatedconv::gated_residual",
    f"(Tensor x, Tensor shortcut, Tensor? layer, Tensor weight, Tensor bias, {_PARAMETERS}, Tensor? noise, "
    "Tensor? running_mean, Tensor? running_var, Tensor? running_threshold, float eps, float gate_eps, "
    f"{_GATE}) -> (Tensor out, Tensor pooled_out, Tensor stat, Tensor pooled, Tensor normed, Tensor gate, "
    "Tensor rate, Tensor logits, Tensor hidden, Tensor gate_stat, Tensor threshold)",
)
torch.library.define(
    "gatedconv::gated_residual_backward",
    "(Tensor? d_out, Tensor? d_pooled, Tensor? d_rate, Tensor? d_logits, Tensor x, Tensor out, Tensor stat, "
    "Tensor pooled, Tensor normed, Tensor gate, Tensor logits, Tensor hidden, Tensor gate_stat, Tensor threshold, "
    "Tensor? layer, Tensor weight, Tensor bias, Tensor? weight1, Tensor? norm_weight, Tensor? norm_bias, "
    f"Tensor? weight2, Tensor? noise, int shortcut_dtype, {_GATE}) -> Tensor[]",
)


def compiled_residual(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None
) -> ResidualOutput:
    """Compute `gated_residual` through the operators; the buffers move here, in the graph."""
    gate_arguments: tuple[Any, ...] = ((None,) * 10, 0.0, "ste", 1.0, True, True, 0)
    if channel is not None:
        parameters, statistics, options, noise = channel
        tensors = (*parameters, noise, statistics.mean, statistics.var, statistics.threshold)
        dtype = DTYPES.index(options.dtype or x.dtype)
        gate_arguments = (
            tensors, options.eps, options.estimator, options.temperature, options.training, options.batch_stats, dtype
        )  # fmt: skip
    tensors, gate_eps, *rest = gate_arguments
    result = torch.ops.gatedconv.gated_residual.default(
        x, shortcut, layer, norm.weight, norm.bias, *tensors, norm.eps, gate_eps, *rest
    )
    out, pooled_out, stat, _, _, gate, rate, logits, _, gate_stat, threshold = result
    with torch.no_grad():
        norm.mean.lerp_(stat[0].detach(), norm.momentum)
        norm.var.lerp_(stat[2].detach(), norm.momentum)
        norm.batches.add_(1)
    if channel is None:
        return ResidualOutput(out, pooled_out, None)
    move_buffers(channel.statistics, channel.options, rate, gate_stat, threshold)
    return ResidualOutput(out, pooled_out, GateOutput(gate.detach(), rate, logits))


def _forward_cuda(
    x: Tensor, shortcut: Tensor, layer: Tensor | None, weight: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    from gatedconv.kernels import gate_launch, gated_residual_launch

    parameters, (noise, mean, var, threshold) = arguments[:6], arguments[6:10]
    eps, gate_eps, estimator, _, train, batch_stats, dtype = arguments[10:]
    gated = parameters[4] is not None
    statistics = gated_residual_launch.normalise(x, weight, bias, None, eps=eps, momentum=0.0, normed=gated)
    none = [weight.new_empty(0) for _ in range(6)]
    decision: Any = None
    if gated:
        decision = gate_launch.forward(
            statistics.normed, *parameters, noise, gate_launch.Running(mean, var, None, None, threshold),
            estimator=estimator, train=train, batch_stats=batch_stats, update=False, flatten=False, eps=gate_eps,
            norm_momentum=0.0, momentum=0.0, dtype=DTYPES[dtype], one_launch=False,
        )  # fmt: skip
    layer = None if layer is None else layer.contiguous()
    gates = decision.gate if gated else None
    out, pooled_out = gated_residual_launch.forward(
        x, shortcut, statistics.stat, weight, bias, layer, gates, pool=True
    )
    first = (out, pooled_out, statistics.stat, statistics.pooled)
    if not gated:
        return *first, weight.new_empty(0), *none
    rest = (decision.gate, decision.rate, decision.logits, decision.hidden, decision.stat, decision.threshold)
    return *first, statistics.normed, *rest


def _backward_cuda(*arguments: Any) -> list[Tensor]:
    from gatedconv.kernels import gate_backward_launch, gate_launch, gated_residual_launch

    d_out, d_pooled, d_rate, d_logits, x, out, stat, pooled, normed, gate, *rest = arguments
    logits, hidden, gate_stat, threshold, layer, weight, bias, *rest = rest
    weight1, norm_weight, norm_bias, weight2, noise, shortcut_dtype, *options = rest
    estimator, temperature, train, batch_stats, _ = options
    layer = None if layer is None else layer.contiguous()
    channel = None if weight2 is None else gate
    step = gated_residual_launch.Backward(d_out, d_pooled, out, x, stat, weight, bias, layer, channel)
    d_normed, grads = None, [weight.new_empty(0) for _ in range(6)]
    if weight2 is not None:
        saved = gate_launch.GateForward(gate, gate, logits, normed, hidden, gate_stat, threshold)
        d_normed, *grads = gate_backward_launch.backward(
            step.d_channel, d_rate, d_logits, normed, saved, weight1, norm_weight, norm_bias, weight2, noise,
            estimator=estimator, temperature=temperature, train=train, batch_stats=batch_stats, need_dx=True,
        )  # fmt: skip
    like = torch.empty_like(out, dtype=DTYPES[shortcut_dtype], device="meta")
    dx, d_shortcut, d_weight, d_bias, d_layer = step.finish(pooled, d_normed, like, True)
    return [dx, d_shortcut, weight.new_empty(0) if d_layer is None else d_layer, d_weight, d_bias, *grads]


@torch.library.register_fake("gatedconv::gated_residual")
def _forward_fake(
    x: Tensor, shortcut: Tensor, layer: Tensor | None, weight: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    from gatedconv.kernels.launch import gradient_like

    batch, channels = x.shape[:2]
    weight1, weight2 = arguments[0], arguments[4]
    new = weight.new_empty
    out = gradient_like(x, torch.promote_types(x.dtype, shortcut.dtype))
    first = (out, new(batch, channels), new(3, channels), new(batch, channels))
    if weight2 is None:
        return *first, *(new(0) for _ in range(7))
    gates, hidden = weight2.shape[0], 0 if weight1 is None else weight1.shape[0]
    gate = new((batch, gates), dtype=DTYPES[arguments[-1]])
    decision = (gate, new(gates), new(batch, gates), new(batch, hidden), new(3, hidden), new(gates))
    return *first, new(batch, channels), *decision


@torch.library.register_fake("gatedconv::gated_residual_backward")
def _backward_fake(*arguments: Any) -> list[Tensor]:
    from gatedconv.kernels.launch import gradient_like

    x, out = arguments[4:6]
    layer, weight, _, weight1, _, _, weight2 = arguments[14:21]
    new = weight.new_empty
    d_shortcut = gradient_like(out, DTYPES[arguments[22]])
    d_layer = new(0) if layer is None else torch.empty_like(layer, memory_format=torch.contiguous_format)
    first = [gradient_like(x, x.dtype), d_shortcut, d_layer, torch.empty_like(weight), torch.empty_like(weight)]
    if weight2 is None:
        return [*first, *(new(0) for _ in range(6))]
    units = 0 if weight1 is None else weight1.shape[0]
    d_weight1 = (0, 0) if weight1 is None else tuple(weight1.shape)
    return [*first, new(d_weight1), new(units), new(units), new(units), new(weight2.shape), new(weight2.shape[0])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shortcut, layer, weight, bias, weight1, _, norm_weight, norm_bias, weight2, _, noise = inputs[:12]
    out, _, stat, pooled, normed, gate, _, logits, hidden, gate_stat, threshold = output
    ctx.save_for_backward(
        x, out, stat, pooled, normed, gate, logits, hidden, gate_stat, threshold, layer, weight, bias, weight1,
        norm_weight, norm_bias, weight2, noise,
    )  # fmt: skip
    ctx.options = (DTYPES.index(shortcut.dtype), *inputs[17:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> Sequence[Tensor | None]:
    d_out, d_pooled, d_rate, d_logits = grads[0], grads[1], grads[6], grads[7]
    results: list[Tensor | None] = torch.ops.gatedconv.gated_residual_backward.default(
        d_out, d_pooled, d_rate, d_logits, *ctx.saved_tensors, *ctx.options
    )
    layer, weight1, weight2 = ctx.saved_tensors[10], ctx.saved_tensors[13], ctx.saved_tensors[16]
    dx, d_shortcut, d_layer, d_weight, d_bias, *gate = results
    hidden = [None] * 4 if weight1 is None else gate[:4]
    last = [None] * 2 if weight2 is None else gate[4:]
    return dx, d_shortcut, None if layer is None else d_layer, d_weight, d_bias, *hidden, *last, *[None] * 11


torch.library.impl("gatedconv::gated_residual", "CUDA", _forward_cuda)
torch.library.impl("gatedconv::gated_residual_backward", "CUDA", _backward_cuda)
torch.library.impl("gatedconv::gated_residual", "CPU", closed_form.forward)
torch.library.impl("gatedconv::gated_residual_backward", "CPU", closed_form.backward)
torch.library.register_autograd("gatedconv::gated_residual", _backward, setup_context=_setup)
