"""The gate's Triton kernels behind autograd: a Function in eager mode, an operator in a compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatedconv.kernels import gate_backward_launch, gate_launch
from gatedconv.ops import _gate_library
from gatedconv.ops._gate_arguments import GateOptions, GateOutput, GateParameters, GateStatistics

__all__ = ["backward_options", "forward_options", "fused_gate", "require_batch"]


def fused_gate(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None,
) -> GateOutput:
    """Compute `gate` by kernels; the arguments have been checked."""
    require_batch(x, parameters, options)
    if torch.compiler.is_compiling():
        return _gate_library.compiled_gate(x, parameters, statistics, options, noise)
    return GateOutput(*_Gate.apply(x, *parameters, noise, statistics, options))


def require_batch(x: Tensor, parameters: GateParameters, options: GateOptions) -> None:
    """Raise what PyTorch's BatchNorm raises where one sample has no statistics."""
    if parameters.weight1 is not None and options.batch_stats and x.shape[0] < 2:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{(x.shape[0], parameters.weight1.shape[0])}"
        )


def forward_options(options: GateOptions, x: Tensor) -> dict[str, Any]:
    """The options of the forward launcher; running buffers move in it."""
    return {
        "estimator": options.estimator,
        "train": options.training,
        "batch_stats": options.batch_stats,
        "update": options.training,
        "flatten": options.flatten,
        "eps": options.eps,
        "norm_momentum": options.norm_momentum or 0.0,
        "momentum": options.momentum,
        "dtype": options.dtype or x.dtype,
    }


def backward_options(options: GateOptions) -> dict[str, Any]:
    """The options of the backward launcher."""
    return {
        "estimator": options.estimator,
        "temperature": options.temperature,
        "train": options.training,
        "batch_stats": options.batch_stats,
    }


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        parameters, (noise, statistics, options) = GateParameters(*arguments[:6]), arguments[6:]
        running = gate_launch.Running(*statistics)
        out = gate_launch.forward(x, *parameters, noise, running, **forward_options(options, x))
        ctx.set_materialize_grads(False)
        pooled = x.dim() == 4 and not options.flatten
        ctx.save_for_backward(
            None if pooled else x,
            parameters.weight1,
            parameters.norm_weight,
            parameters.norm_bias,
            parameters.weight2,
            noise,
            *out[2:],
        )
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype
        return out.gate, out.rate, out.logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_gate: Tensor | None, d_rate: Tensor | None, d_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if d_gate is None and d_rate is None and d_logits is None:
            return (None,) * 10
        x, weight1, norm_weight, norm_bias, weight2, noise, *rest = ctx.saved_tensors
        saved = gate_launch.GateForward(None, None, *rest)
        grads = gate_backward_launch.backward(
            d_gate,
            d_rate,
            d_logits,
            saved.pooled if x is None else x,
            saved,
            weight1,
            norm_weight,
            norm_bias,
            weight2,
            noise,
            **backward_options(ctx.options),
            need_dx=ctx.needs_input_grad[0],
            pixels=ctx.shape[2] * ctx.shape[3] if x is None else 1,
            dtype=ctx.dtype,
        )
        dx: Tensor | None = grads[0] if ctx.needs_input_grad[0] else None
        if dx is not None and x is None:
            dx = dx[:, :, None, None].expand(ctx.shape)  # the mean's gradient: no full-size tensor is written
        hidden = grads[1:5] if weight1 is not None else (None,) * 4
        return dx, *hidden, *grads[5:], None, None, None
