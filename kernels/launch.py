"""What every launcher needs: tile sizes, views of an image as channels and positions, the right device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

TILE = 2048  # elements of a map in flight per program: 16 a thread; with 32 the addresses take 240 registers
REACH = 1 << 31  # offsets within a sample are 32-bit


def power_of_two(number: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least ``number``, kept within [least, most]."""
    return min(max(1 << max(number - 1, 0).bit_length(), least), most)


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def positions(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Give x (N, C, H, W) with its H*W positions at one stride, and the strides (sample, channel, position).

    NCHW and channels_last are as they are; where rows are not evenly spaced (a crop, a subsampled map), or a sample
    reaches further than 32 bits, x is copied.
    """
    channels, height, width = x.shape[1:]
    stride = x.stride()
    step = stride[2] if width == 1 and height > 1 else stride[3]
    uneven = height > 1 and width > 1 and stride[2] != width * stride[3]
    far = (channels - 1) * stride[1] + (height * width - 1) * step >= REACH
    if (uneven or far) and not x.is_contiguous():
        return positions(x.contiguous())
    return x, (stride[0], stride[1], step)


def gradient_like(features: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An empty gradient: in the order of strides of features whose positions are evenly spaced, else contiguous."""
    if features.dim() == 4:
        features = positions(features)[0]
        return positions(torch.empty_like(features, dtype=dtype))[0]
    return torch.empty_like(features, dtype=dtype)


def map_tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    """For a pass over x (N, C, H, W): programs that share the channels of a sample, and their tile sizes."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if x.stride(1) == 1 and channels > 1:  # channels_last: neighbours in memory are channels
        block_c = power_of_two(channels, most=64)
        block_s = power_of_two(pixels, most=TILE // block_c)
    else:
        block_s = power_of_two(pixels, most=128)
        block_c = power_of_two(channels, most=TILE // block_s)
    return ceil_div(channels, block_c), {"BLOCK_C": block_c, "BLOCK_S": block_s}


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x the current one, as a launch expects it."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
