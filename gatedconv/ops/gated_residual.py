"""The end of a gated residual block in training: normalise, gate, add the shortcut, ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.ops import _triton
from gatedconv.ops._gate_arguments import check_gate
from gatedconv.ops._residual_arguments import InnerGate, NormArguments, ResidualOutput
from gatedconv.ops.gate import gate_reference, kernels_can

__all__ = [
    "InnerGate",
    "NormArguments",
    "ResidualOutput",
    "gated_residual",
    "gated_residual_reference",
]

_HALVES = (torch.float16, torch.bfloat16, torch.float32)


def gated_residual(
    x: Tensor,
    shortcut: Tensor,
    norm: NormArguments,
    layer: Tensor | None = None,
    channel: InnerGate | None = None,
) -> ResidualOutput:
    """Compute out = ReLU(shortcut + layer * channel * BN(x)), the channel gate reading the pooled BN(x).

    Where Triton runs, BN(x) is never stored: what backward keeps beyond the inputs is ``out``. No gradient goes
    through ``channel.gate`` itself there: what it does is in ``out``.

    Args:
        x: (N, C, H, W), the branch's last convolution; fp16, bf16, fp32 or fp64.
        shortcut: (N, C, H, W).
        norm: the norm after that convolution.
        layer: (N, 1), the layer gate's decision, or None.
        channel: the channel gate, or None.

    Raises:
        TypeError: not floating point.
        ValueError: shapes or devices do not fit, or there is but one value per channel.
    """
    _check(x, shortcut, norm, layer, channel)
    if not _kernels_can(x, shortcut, norm, layer, channel):
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


def _kernels_can(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None
) -> bool:
    maps = [x, shortcut] if layer is None else [x, shortcut, layer]
    if not _triton.kernels_run_on(x) or any(t.dtype not in _HALVES for t in maps) or x.numel() <= x.shape[1]:
        return False
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in norm[:4]) or norm.batches.dtype != torch.int64:
        return False
    if channel is None:
        return True
    # A gate that reads every position needs BN(x) stored.
    return not channel.options.flatten and kernels_can(x, *channel)


def _check(
    x: Tensor, shortcut: Tensor, norm: NormArguments, layer: Tensor | None, channel: InnerGate | None
) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise _kind_or_shape("x", x, "(N, C, H, W)")
    per_channel = (x.shape[1],)
    named: list[tuple[str, Any, tuple[int, ...]]] = [("x", x, x.shape), ("shortcut", shortcut, x.shape)]
    named += [] if layer is None else [("layer", layer, (x.shape[0], 1))]
    named += [(f"norm.{name}", getattr(norm, name), per_channel) for name in ("weight", "bias", "mean", "var")]
    for name, tensor, shape in named:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape != shape:
            raise _kind_or_shape(name, tensor, tuple(shape))
        if tensor.device != x.device:
            raise ValueError(f"gated_residual: {name} must be on {x.device}, as x is, got {tensor.device}")
    if channel is not None:
        gates = channel.parameters.weight2.shape[0]
        if gates != x.shape[1]:
            raise ValueError(f"gated_residual: channel must have {x.shape[1]} gates, one a channel of x, got {gates}")
        check_gate(x, *channel)


def _kind_or_shape(name: str, tensor: Any, shape: Any) -> TypeError | ValueError:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        return TypeError(f"gated_residual: {name} must be a floating point tensor, got {kind}")
    return ValueError(f"gated_residual: {name} must have shape {shape}, got {tuple(tensor.shape)}")
