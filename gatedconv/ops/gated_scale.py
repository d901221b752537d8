"""A gate on the channels of a feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatedconv.ops import _triton

__all__ = ["gated_scale", "gated_scale_reference"]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gated_scale(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply the channels of x (N, C, H, W) by gate (N, C).

    Where Triton runs, both gradients come from one pass and no product is stored on the way.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x, gate)
    if not _triton.kernels_run_on(x) or {x.dtype, gate.dtype} - set(_KERNEL_DTYPES) or x.numel() == 0:
        return x * gate[:, :, None, None]
    return _GatedScale.apply(x, gate)


def gated_scale_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Compute `gated_scale` from PyTorch's own differentiable functions."""
    _check(x, gate)
    return x * gate[:, :, None, None]


def _check(x: Tensor, gate: Tensor) -> None:
    if x.dim() != 4 or gate.shape != x.shape[:2]:
        shapes = f"{tuple(x.shape)} and {tuple(gate.shape)}"
        raise ValueError(f"gated_scale: x must be (N, C, H, W) and gate (N, C), got {shapes}")


class _GatedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        from gatedconv.kernels import gated_scale as kernels

        ctx.save_for_backward(x, gate)
        return kernels.forward(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        from gatedconv.kernels import gated_scale as kernels

        return kernels.backward(d_out, *ctx.saved_tensors)
