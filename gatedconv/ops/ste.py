"""The straight-through estimator of a gate (equations 3 and 4 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatedconv._checks import require_tensor


class _Ste(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return (logits > 0).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return torch.where(logits.abs() <= 1, grad, 0)


def ste(logits: Tensor) -> Tensor:
    """Open a gate where its logit is positive; pass the gradient where the logit is within [-1, 1].

    Args:
        logits: Floating point, any shape.

    Returns:
        The gate, exactly 0 or 1, in the shape and dtype of ``logits``; a NaN logit closes it. The gradient is
        that of the identity where ``|logit| <= 1`` (both ends included) and exactly 0 elsewhere.

    Raises:
        TypeError: ``logits`` is not a floating point tensor.
    """
    require_tensor("ste", "logits", logits)
    return _Ste.apply(logits)


def ste_reference(logits: Tensor) -> Tensor:
    """Compute `ste` from PyTorch's own differentiable functions."""
    gate = (logits > 0).to(logits.dtype)
    # Adding the logit gives the gate its gradient; subtracting its value leaves the gate.
    passes = torch.where(logits.abs() <= 1, logits, 0)
    return gate + (passes - passes.detach())
