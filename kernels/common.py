"""Shared by the kernel files: maps by strides, norms, tile sizes.

In all of them a launched kernel marks its constants as constexpr; the functions that it calls take them as they come,
because Triton passes a constexpr on as one. Upper case is a size, a flag or a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a map in flight per program: 16 a thread. With 32 the addresses alone take 240 registers (ptxas, sm_90).
# Its speed is unmeasured.
TILE = 2048
REACH = 1 << 31  # offsets within a sample are 32-bit
ASSUMED_MULTIPROCESSORS = 132  # of an H100 or H200; used where there is no GPU

# Options of every kernel that sums. With fused multiply-adds, the lanes that hold copies of one sum disagree in the
# last bit, and which copy is kept would be undefined: sums would no longer have a fixed order.
FIXED_ORDER = {"enable_fp_fusion": False}


class StridedMap(NamedTuple):
    """A map (N, C, HW) as kernels take it: the tensor, and its strides in elements."""

    ptr: Tensor
    stride_n: int
    stride_c: int
    stride_s: int


@triton.jit
def map_at(map, n, c, s):
    """Addresses of channels c and positions s of sample n: (channels, positions)."""
    sample = map.ptr + n.to(tl.int64) * map.stride_n  # a batch may be larger than 2^31 elements, a sample not
    return sample + (c * map.stride_c)[:, None] + (s * map.stride_s)[None, :]


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, as PyTorch does; the hardware's maximum returns 0."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def norm_terms(norm, c, C):
    """Mean, 1 / sqrt(var + eps), weight and bias of a norm for channels c: norm.stat (3, C), gamma, beta (C,)."""
    mean = tl.load(norm.stat + c, mask=c < C, other=0.0)
    rstd = tl.load(norm.stat + C + c, mask=c < C, other=0.0)
    gamma = tl.load(norm.gamma + c, mask=c < C, other=0.0)
    beta = tl.load(norm.beta + c, mask=c < C, other=0.0)
    return mean, rstd, gamma, beta


@triton.jit
def move_running(buffer_ptr, value, momentum, mask):
    """Move a running buffer towards a value, as torch.lerp does."""
    old = tl.load(buffer_ptr, mask=mask)
    tl.debug_barrier()  # warps hold copies of one element: all have read it before one of them overwrites it
    tl.store(buffer_ptr, old + momentum * (value - old), mask=mask)


def as_map(x: Tensor) -> StridedMap:
    """Return x (N, C, H, W) with its H*W positions at one stride, or features (N, C) as maps of one position.

    NCHW and channels_last are taken as they are. x is copied where its rows are not evenly spaced (a crop, a
    subsampled map), or where a sample spans more than 32 bits can address.
    """
    if x.dim() == 2:
        return StridedMap(x, *x.stride(), 0)
    channels, height, width = x.shape[1:]
    stride = x.stride()
    step = stride[2] if width == 1 and height > 1 else stride[3]
    uneven = height > 1 and width > 1 and stride[2] != width * stride[3]
    far = (channels - 1) * stride[1] + (height * width - 1) * step >= REACH
    if (uneven or far) and not x.is_contiguous():
        return as_map(x.contiguous())
    return StridedMap(x, stride[0], stride[1], step)


def gradient_like(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return an empty gradient of x, in the order of its strides where its positions are evenly spaced."""
    return as_map(torch.empty_like(as_map(x).ptr, dtype=dtype)).ptr


def map_tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    """The grid of a pass over x (N, C, H, W): programs that share a sample's channels, and their tile sizes."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if x.stride(1) == 1 and channels > 1:  # channels_last: neighbors in memory are channels
        block_c = power_of_two(channels, most=64)
        block_s = power_of_two(pixels, most=TILE // block_c)
    else:
        block_s = power_of_two(pixels, most=128)
        block_c = power_of_two(channels, most=TILE // block_s)
    return ceil_div(channels, block_c), {"BLOCK_C": block_c, "BLOCK_S": block_s}


def power_of_two(number: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least ``number``, kept within [least, most]."""
    return min(max(1 << max(number - 1, 0).bit_length(), least), most)


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device, by which a launch chooses its number of programs."""
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else ASSUMED_MULTIPROCESSORS
