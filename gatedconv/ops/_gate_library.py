"""The gate as two registered operators, ``gatedconv::gate_forward`` and ``gatedconv::gate_backward``.

They are what a compiled graph sees: functional, with outputs of their own, shapes known beforehand. Eager
code does not come here: autograd through the dispatcher costs several times what a Function costs. On a CPU they are
closed forms in PyTorch, which tests hold against autograd; nothing else takes them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedconv.ops import _gate_closed_form
from gatedconv.ops._gate_arguments import GateOptions, GateOutput, GateParameters, GateStatistics
from gatedconv.ops._gate_closed_form import DTYPES

__all__ = ["compiled_gate", "move_buffers"]

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
        DTYPES.index(options.dtype or x.dtype),
    )
    move_buffers(statistics, options, rate, stat, threshold)
    return GateOutput(gate, rate, logits)


def move_buffers(
    statistics: GateStatistics, options: GateOptions, rate: Tensor, stat: Tensor, threshold: Tensor
) -> None:
    """Move the running buffers by what an operator computed."""
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
            train=train,
            batch_stats=batch_stats,
            update=False,
            flatten=flatten,
            eps=eps,
            norm_momentum=0.0,
            momentum=0.0,
            dtype=DTYPES[dtype],
            one_launch=False,  # a counter made in here would lie in the memory of a compiled graph
        )
    )


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
    from gatedconv.kernels import gate_backward_launch, gate_launch

    saved = gate_launch.GateForward(logits, logits, logits, features, hidden, stat, threshold)
    return list(
        gate_backward_launch.backward(
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
            dtype=DTYPES[dtype],
        )
    )


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
        weight2.new_empty((batch, gates), dtype=DTYPES[dtype]),
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
    from gatedconv.kernels.launch import gradient_like

    gates, inner = weight2.shape
    units = 0 if weight1 is None else weight1.shape[0]
    d_weight1 = (0, 0) if weight1 is None else tuple(weight1.shape)
    new = weight2.new_empty
    dx = gradient_like(features, DTYPES[dtype]) if need_dx else new(0)
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
        DTYPES.index(ctx.dtype),
    )
    if not ctx.needs_input_grad[0]:
        dx = None
    elif ctx.shape is not None:
        dx = dx[:, :, None, None].expand(ctx.shape)
    hidden = rest[:4] if ctx.saved_tensors[5] is not None else [None] * 4
    return dx, *hidden, *rest[4:], *[None] * 11


torch.library.impl("gatedconv::gate_forward", "CUDA", _forward_cuda)
torch.library.impl("gatedconv::gate_backward", "CUDA", _backward_cuda)
torch.library.impl("gatedconv::gate_forward", "CPU", _gate_closed_form.forward)
torch.library.impl("gatedconv::gate_backward", "CPU", _gate_closed_form.backward)
torch.library.register_autograd("gatedconv::gate_forward", _backward, setup_context=_setup)
