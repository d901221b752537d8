"""What every launcher needs: tile sizes, views of an image as channels and positions, the right device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Launch = Callable[..., Any]


def power_of_two(number: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least ``number``, kept within [least, most]."""
    return min(max(1 << max(number - 1, 0).bit_length(), least), most)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def positions(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x (N, C, H, W) with its H*W positions at one stride, and the strides (sample, channel, position).

    NCHW and channels_last are as they are; where rows are not evenly spaced (a crop, a subsampled map) x is copied.
    """
    height, width = x.shape[2], x.shape[3]
    stride = x.stride()
    if height == 1:
        return x, (stride[0], stride[1], stride[3])
    if width == 1:
        return x, (stride[0], stride[1], stride[2])
    if stride[2] != width * stride[3]:
        return positions(x.contiguous())
    return x, (stride[0], stride[1], stride[3])


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x the current one, as a launch expects it."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
