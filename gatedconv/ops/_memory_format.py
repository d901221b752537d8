"""The memory format of a convolution's output."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["conv_memory_format"]


def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the format of conv2d's output: channels_last if either argument is in it."""
    if _is_channels_last(input) or _is_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format


def _is_channels_last(tensor: Tensor) -> bool:
    """Apply PyTorch's rule for ambiguous strides, too (c10: is_channels_last_strides_2d)."""
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(sizes[dim], 1)
    return True
