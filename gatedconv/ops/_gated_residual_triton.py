"""The kernels of a block's end behind autograd, an inner channel gate included: one node for all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatedconv.kernels import gate_backward_launch, gate_launch, gated_residual_launch
from gatedconv.ops import _gated_residual_library
from gatedconv.ops._gate_arguments import GateOutput, GateParameters
from gatedconv.ops._gate_triton import backward_options, forward_options, require_batch
from gatedconv.ops._residual_arguments import InnerGate, NormArguments, ResidualOutput

__all__ = ["fused_residual"]


def fused_residual(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None
) -> ResidualOutput:
    """Compute `gated_residual` by kernels; the arguments have been checked."""
    parameters: tuple[Tensor | None, ...] = (None,) * 6
    if channel is not None:
        parameters = channel.parameters
        require_batch(x, channel.parameters, channel.options)
    if torch.compiler.is_compiling():
        return _gated_residual_library.compiled_residual(x, shortcut, norm, layer, channel)
    out, pooled, *decision = _GatedResidual.apply(
        x, shortcut, layer, norm.weight, norm.bias, *parameters, norm, channel
    )
    return ResidualOutput(out, pooled, GateOutput(*decision) if channel is not None else None)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor,
        layer: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, ...]:
        norm, channel = arguments[6:]
        statistics = gated_residual_launch.normalise(
            x,
            weight,
            bias,
            (norm.mean, norm.var, norm.batches),
            eps=norm.eps,
            momentum=norm.momentum,
            normed=channel is not None,
        )
        decision = None if channel is None else _decide(statistics.normed, channel, x)
        layer = None if layer is None else layer.contiguous()
        gates = None if decision is None else decision.gate
        out, pooled_out = gated_residual_launch.forward(
            x, shortcut, statistics.stat, weight, bias, layer, gates, pool=True
        )
        ctx.set_materialize_grads(False)
        ctx.channel = channel
        ctx.shortcut = torch.empty_like(shortcut, device="meta")  # a layout without memory
        ctx.save_for_backward(
            x,
            out,
            statistics.stat,
            statistics.pooled,
            weight,
            bias,
            layer,
            statistics.normed,
            *(decision or ()),
            *(() if channel is None else (*channel.parameters, channel.noise)),
        )
        if decision is None:
            return out, pooled_out
        ctx.mark_non_differentiable(decision.gate)
        return out, pooled_out, decision.gate, decision.rate, decision.logits

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
        x, out, stat, pooled, weight, bias, layer, normed, *rest = ctx.saved_tensors
        channel: InnerGate | None = ctx.channel
        saved = gate_launch.GateForward(*rest[:7]) if channel is not None else None
        step = gated_residual_launch.Backward(
            d_out, d_pooled, out, x, stat, weight, bias, layer, None if saved is None else saved.gate
        )
        d_normed, d_gate_parameters = None, (None,) * 6
        if channel is not None and saved is not None:
            parameters, noise = GateParameters(*rest[7:13]), rest[13]
            d_normed, *grads = gate_backward_launch.backward(
                step.d_channel,
                d_rate,
                d_logits,
                normed,
                saved,
                parameters.weight1,
                parameters.norm_weight,
                parameters.norm_bias,
                parameters.weight2,
                noise,
                **backward_options(channel.options),
                need_dx=True,
            )
            hidden = grads[:4] if parameters.weight1 is not None else (None,) * 4
            d_gate_parameters = (*hidden, *grads[4:])
        dx, d_shortcut, d_weight, d_bias, d_layer = step.finish(
            pooled, d_normed, ctx.shortcut, ctx.needs_input_grad[1]
        )
        return dx, d_shortcut, d_layer, d_weight, d_bias, *d_gate_parameters, None, None


def _decide(pooled: Tensor, channel: InnerGate, x: Tensor) -> gate_launch.GateForward:
    parameters, statistics, options, noise = channel
    running = gate_launch.Running(*statistics)
    return gate_launch.forward(pooled, *parameters, noise, running, **forward_options(options, x))
