"""A gate on the channels of a feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatedconv._checks import require_map, require_tensor
from gatedconv.ops import _triton


def gated_scale(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply the channels of x (N, C, H, W) by gate (N, C); the result has the dtype that PyTorch promotes them to.

    Where Triton runs, both gradients come from one pass and no product is stored on the way; in a compiled graph as
    the operator ``gatedconv::gated_scale``.

    Raises:
        TypeError: not floating point.
        ValueError: shapes or devices do not fit.
    """
    _check(x, gate)
    if not _triton.kernels_run_on(x) or {x.dtype, gate.dtype} - set(_triton.KERNEL_DTYPES) or x.numel() == 0:
        return x * gate[:, :, None, None]
    if torch.compiler.is_compiling():
        return torch.ops.gatedconv.gated_scale.default(x, gate)
    return _GatedScale.apply(x, gate)


def gated_scale_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Compute `gated_scale` from PyTorch's own differentiable functions."""
    _check(x, gate)
    return x * gate[:, :, None, None]


def _check(x: Tensor, gate: Tensor) -> None:
    require_map("gated_scale", x)
    require_tensor("gated_scale", "gate", gate, x.shape[:2], x.device)


class _GatedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return _forward_kernel(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        return _backward_kernel(d_out, *ctx.saved_tensors)


torch.library.define("gatedconv::gated_scale", "(Tensor x, Tensor gate) -> Tensor")
torch.library.define("gatedconv::gated_scale_backward", "(Tensor d_out, Tensor x, Tensor gate) -> (Tensor, Tensor)")


def _forward_kernel(x: Tensor, gate: Tensor) -> Tensor:
    from gatedconv.kernels import gated_scale as kernels

    return kernels.forward(x, gate)


def _backward_kernel(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    from gatedconv.kernels import gated_scale as kernels

    return kernels.backward(d_out, x, gate)


@torch.library.register_fake("gatedconv::gated_scale")
def _forward_fake(x: Tensor, gate: Tensor) -> Tensor:
    from gatedconv.kernels.common import gradient_like

    return gradient_like(x, torch.promote_types(x.dtype, gate.dtype))


@torch.library.register_fake("gatedconv::gated_scale_backward")
def _backward_fake(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    from gatedconv.kernels.common import gradient_like

    return gradient_like(x, x.dtype), torch.empty_like(gate, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.gatedconv.gated_scale_backward.default(d_out, *ctx.saved_tensors)


torch.library.impl("gatedconv::gated_scale", "CUDA", _forward_kernel)
torch.library.impl("gatedconv::gated_scale_backward", "CUDA", _backward_kernel)
torch.library.register_autograd("gatedconv::gated_scale", _backward, setup_context=_setup)
