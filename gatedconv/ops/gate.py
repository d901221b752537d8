"""The gate: from a feature map to a binary decision per sample and gate (Table 2 of the paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.ops import _triton
from gatedconv.ops._gate_arguments import GateOptions, GateOutput, GateParameters, GateStatistics, check_gate
from gatedconv.ops.estimate import estimate
from gatedconv.ops.global_average_pool import global_average_pool

__all__ = [
    "GateOptions",
    "GateOutput",
    "GateParameters",
    "GateStatistics",
    "gate",
    "gate_reference",
    "kernels_can",
]

_HALVES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HIDDEN = 128


def gate(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None = None,
) -> GateOutput:
    """Decide, per sample, which gates are open.

    features -> dense -> BatchNorm -> ReLU -> dense -> estimator; in 1FC the second dense layer stands alone.
    Runs as at most two kernels forward and two backward where Triton runs (CUDA, fp32 parameters), in PyTorch
    elsewhere.

    Args:
        x: (N, C, H, W), pooled over H and W or flattened; or features (N, K). fp16, bf16, fp32 or fp64.
        parameters: the layers, in fp32 or fp64, which is what logits are computed in, autocast or not.
        statistics: buffers, moved in place as `torch.nn.functional.batch_norm` moves them.
        options: how to decide.
        noise: (N, O), uniform on [0, 1), in the dtype of the parameters, for "gumbel" and "bernoulli"; None
            makes them deterministic.

    Returns:
        gate (N, O), exactly 0 or 1, in ``options.dtype``; open_rate (O,); logits (N, O).

    Raises:
        TypeError: a tensor is not floating point, or parameters differ in dtype.
        ValueError: shapes or devices do not fit, the estimator is unknown, or batch statistics are asked of one
            sample.
    """
    check_gate(x, parameters, statistics, options, noise)
    if not kernels_can(x, parameters, statistics, options, noise):
        return _reference(x, parameters, statistics, options, noise)
    from gatedconv.ops._gate_triton import fused_gate

    return fused_gate(x, parameters, statistics, options, noise)


def gate_reference(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None = None,
) -> GateOutput:
    """Compute `gate` from PyTorch's own differentiable functions."""
    check_gate(x, parameters, statistics, options, noise)
    return _reference(x, parameters, statistics, options, noise)


def _reference(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None,
) -> GateOutput:
    dtype = parameters.weight2.dtype
    with torch.autocast(device_type=x.device.type, enabled=False):
        # Half-precision logits would flip decisions near 0.
        if x.dim() == 4 and not options.flatten:
            hidden = global_average_pool(x, dtype)
        else:
            hidden = x.flatten(1).to(dtype)
        if parameters.weight1 is not None:
            hidden = F.linear(hidden, parameters.weight1, parameters.bias1)
            hidden = torch.relu(_normalise(hidden, parameters, statistics, options))
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
        open_rate = gate.mean(dim=0)
        if options.training and statistics.open_rate is not None:
            with torch.no_grad():
                statistics.open_rate.lerp_(
                    open_rate.detach().to(statistics.open_rate.dtype), options.momentum
                )
    return GateOutput(gate.to(options.dtype or x.dtype), open_rate, logits)


def _normalise(
    hidden: Tensor, parameters: GateParameters, statistics: GateStatistics, options: GateOptions
) -> Tensor:
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


def kernels_can(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None = None,
) -> bool:
    """Whether the kernels cover this call: every buffer kept, all in fp32, and no cumulative average."""
    if not _triton.kernels_run_on(x) or x.dtype not in _HALVES or (options.dtype or x.dtype) not in _HALVES:
        return False
    if x.numel() == 0 or statistics.open_rate is None or (noise is not None and noise.dtype != torch.float32):
        return False
    kept: list[Tensor | None] = [parameters.weight2, parameters.bias2, statistics.open_rate]
    if options.estimator == "batch_mean":
        kept.append(statistics.threshold)
    if parameters.weight1 is not None:
        if (
            parameters.weight1.shape[0] > _MAX_HIDDEN
            or options.norm_momentum is None
            or statistics.batches is None
            or statistics.batches.dtype != torch.int64
        ):
            return False
        if options.batch_stats and not options.training:
            return False
        kept += [*parameters[:4], statistics.mean, statistics.var]
    return all(t is not None and t.dtype == torch.float32 and t.is_contiguous() for t in kept)
