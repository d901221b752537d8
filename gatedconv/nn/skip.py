"""Skipped work of a gated block: its branch in training; closed samples and inputs in eval, on CUDA.

Training: if every logit of a block's layer gate is below -1, the gate is 0 for every sample: the branch adds nothing,
and by eq. 4 no gradient passes. Neither branch nor gate would learn anything from the batch, so skipping the branch is
exact. Its parameters get zero gradients, not none: momentum and weight decay act on them as usual, and
DistributedDataParallel finds every gradient. The running statistics of the branch's BatchNorm keep their values.

Eval, on CUDA with our kernels on: the convolutions take the gates' decisions as masks for each sample, which stay on
the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedconv import ops
from gatedconv.gating import Gate
from gatedconv.gating.gates import LearnedGate
from gatedconv.nn.conv import Conv2d
from gatedconv.ops import _masked_conv2d_cuda

ConvNorm = tuple[Conv2d, nn.BatchNorm2d]


class BlockSkip:
    """Decides whether a block is skipped in the current step.

    Attributes:
        now: decide from this step's logits, which synchronizes with a GPU; if False, the trainer sets ``closed`` to
            a prediction and verifies it after the step.
        closed: the last decision.
    """

    def __init__(self, *, now: bool) -> None:
        self.now = now
        self.closed = False

    def applies(self, gate: Gate) -> bool:
        """Return whether to skip the block; its layer gate has just processed the batch."""
        if self.now:
            self.closed = bool(is_closed(gate))
        return self.closed


def is_closed(gate: Gate) -> Tensor:
    """Bool (): whether a layer gate closes its block for the whole last batch and nothing needs the branch.

    Where ``gate.needs_gradient`` is set, the branch is computed until the gate's last layer has no weights any more,
    that is, until it can never open again.
    """
    closed = gate.dead.all()
    if isinstance(gate, LearnedGate) and gate.needs_gradient:
        return closed & ~gate.fc2.weight.any()
    return closed


def skip_branch(shortcut: Tensor, block: nn.Module) -> Tensor:
    """The output of a block whose branch is skipped, relu(shortcut); gradients of its parameters are zeros.

    Args:
        shortcut: (N, C, H, W).
        block: its parameters outside ``downsample`` get zero gradients.
    """
    idle = [p for name, p in block.named_parameters() if not name.startswith("downsample.") and p.requires_grad]
    passed: Tensor = _SkippedBranch.apply(shortcut, *idle)
    return torch.relu(passed)


class _SkippedBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return shortcut.view_as(shortcut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))


def folded(conv: Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with an eval-mode norm behind it folded in."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    return conv.weight * scale[:, None, None, None].to(conv.weight.dtype), bias.to(conv.weight.dtype)


def residual_branch(x: Tensor, shortcut: Tensor, is_open: Tensor, first: ConvNorm, last: ConvNorm) -> Tensor:
    """Compute relu(shortcut + branch(x)) on open samples and relu(shortcut) on closed ones.

    Both convolutions run through `masked_conv2d` with a mask for each sample. On CUDA its lists are made on the device
    and a tile of a closed sample ends after it has passed the shortcut on, so the host waits for nothing.

    Args:
        x: (N, C_in, H, W).
        shortcut: (N, C_out, H', W').
        is_open: bool (N,).
        first: The branch's first convolution and norm; a ReLU follows.
        last: Its last ones.
    """
    for i, (conv, norm) in enumerate((first, last)):
        mask = is_open[:, None].expand(-1, conv.out_channels)
        x = _conv_relu(x, conv, norm, mask, None, shortcut if i else None)
    return x


def gated_input_branch(
    x: Tensor, shortcut: Tensor, gate: Gate, position: str, first: ConvNorm, last: ConvNorm
) -> Tensor:
    """Compute relu(shortcut + branch(x)) with a channel gate that decides for each sample what a convolution reads.

    On CUDA the convolution behind the gate takes each sample's open inputs and no others.

    Args:
        x: (N, C_in, H, W).
        shortcut: (N, C_out, H', W').
        gate: In eval; its values are 0 or 1.
        position: "before", it gates x, or "middle", the map between the convolutions.
        first: The branch's first convolution and norm; a ReLU follows.
        last: Its last ones.
    """
    for i, (conv, norm) in enumerate((first, last)):
        everything = torch.ones(conv.out_channels, dtype=torch.bool, device=x.device)
        in_open = gate(x) > 0 if position == ("before", "middle")[i] else None
        x = _conv_relu(x, conv, norm, everything, in_open, shortcut if i else None)
    return x


def _conv_relu(
    x: Tensor, conv: Conv2d, norm: nn.BatchNorm2d, out_open: Tensor, in_open: Tensor | None, residual: Tensor | None
) -> Tensor:
    weight, bias = folded(conv, norm)
    return ops.masked_conv2d(
        x,
        weight,
        bias,
        out_open,
        in_open,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        residual=residual,
        relu=True,
    )


def decides_on_device(x: Tensor, first: ConvNorm, last: ConvNorm) -> bool:
    """Whether to run one of these branches: our kernels are enabled and available, and no gradient is required."""
    if x.device.type != "cuda" or torch.is_grad_enabled() or _masked_conv2d_cuda.kernels_mode() != "on":
        return False
    return all(
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.running_var is not None
        and conv.gate is None
        and conv.padding_mode == "zeros"
        and not (has_hooks(conv) or has_hooks(norm))
        and _masked_conv2d_cuda.supports(x, conv.kernel_size, conv.dilation, conv.groups)
        for conv, norm in (first, last)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether code outside the module runs when it is called, so that it has to be called."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
