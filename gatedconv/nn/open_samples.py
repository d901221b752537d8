"""A gated block in eval that skips closed samples on the device, without a transfer to the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedconv import ops
from gatedconv.gating import Gate
from gatedconv.nn.conv import Conv2d
from gatedconv.ops import cuda_conv

ConvNorm = tuple[Conv2d, nn.BatchNorm2d]


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
        position: "before", it gates x, or "middle", what lies between the convolutions.
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
    if x.device.type != "cuda" or torch.is_grad_enabled() or cuda_conv.kernels_mode() != "on":
        return False
    return all(
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.running_var is not None
        and conv.gate is None
        and conv.padding_mode == "zeros"
        and not (conv._forward_hooks or conv._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks)
        and cuda_conv.takes(x, conv.kernel_size, conv.dilation, conv.groups)
        for conv, norm in (first, last)
    )
