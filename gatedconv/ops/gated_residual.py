"""The end of a gated residual block in training: normalise, gate, add the shortcut, ReLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.ops import _triton
from gatedconv.ops._gate_arguments import GateOptions, GateOutput, GateParameters, GateStatistics
from gatedconv.ops.gate import gate_reference, kernels_can

__all__ = [
    "InnerGate",
    "NormArguments",
    "ResidualOutput",
    "gated_residual",
    "gated_residual_reference",
]


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
    """What leaves a block.

    out (N, C, H, W); pooled (N, C), its mean over H and W in the norm's dtype, for the next block's gate;
    channel: the inner gate's decision, None without one. All differentiable, but ``channel.gate`` by kernels.
    """

    out: Tensor
    pooled: Tensor
    channel: GateOutput | None


def gated_residual(
    x: Tensor,
    shortcut: Tensor,
    norm: NormArguments,
    layer: Tensor | None = None,
    channel: InnerGate | None = None,
) -> ResidualOutput:
    """Compute out = ReLU(shortcut + layer * channel * BN(x)), the channel gate reading the pooled BN(x).

    Where Triton runs, BN(x) is never stored: what backward keeps beyond the inputs is ``out``.

    Args:
        x: (N, C, H, W), the branch's last convolution; fp16, bf16, fp32 or fp64.
        shortcut: (N, C, H, W).
        norm: the norm after that convolution.
        layer: (N, 1), the layer gate's decision, or None.
        channel: the channel gate, or None.

    Raises:
        TypeError: not floating point.
        ValueError: shapes do not fit, or there is but one value per channel.
    """
    _check(x, shortcut, norm, layer)
    if not _kernels_can(x, shortcut, norm, channel):
        return gated_residual_reference(x, shortcut, norm, layer, channel)
    from gatedconv.ops._gated_residual_triton import fused_residual

    return fused_residual(x, shortcut, norm, layer, channel)


def gated_residual_reference(
    x: Tensor,
    shortcut: Tensor,
    norm: NormArguments,
    layer: Tensor | None = None,
    channel: InnerGate | None = None,
) -> ResidualOutput:
    """Compute `gated_residual` from PyTorch's own differentiable functions."""
    _check(x, shortcut, norm, layer)
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


def _kernels_can(x: Tensor, shortcut: Tensor, norm: NormArguments, channel: InnerGate | None = None) -> bool:
    if not _triton.kernels_run_on(x):  # a compiled graph fuses the reference by itself
        return False
    halves = (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in halves or shortcut.dtype not in halves or x.numel() <= x.shape[1]:
        return False
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in norm[:4]):
        return False
    if channel is None:
        return True
    parameters, statistics, options, _ = channel
    # A gate that reads every position needs BN(x) stored.
    return not options.flatten and kernels_can(x, parameters, statistics, options)


def _check(x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None) -> None:
    for name, tensor in (("x", x), ("shortcut", shortcut), ("layer", layer)):
        if tensor is not None and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"gated_residual: {name} must be a floating point tensor, got {kind}")
    if x.dim() != 4 or shortcut.shape != x.shape:
        raise ValueError(
            "gated_residual: x and shortcut must be (N, C, H, W) of one shape, got "
            f"{tuple(x.shape)} and {tuple(shortcut.shape)}"
        )
    if norm.weight.shape != (x.shape[1],):
        raise ValueError(
            f"gated_residual: the norm must have {x.shape[1]} channels, got {tuple(norm.weight.shape)}"
        )
    if layer is not None and layer.shape != (x.shape[0], 1):
        raise ValueError(f"gated_residual: layer must have shape {(x.shape[0], 1)}, got {tuple(layer.shape)}")
