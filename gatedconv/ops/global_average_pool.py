"""The mean of a feature map, which is what a gate reads of it."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedconv._checks import require_map


def global_average_pool(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of x (N, C, H, W) over H and W, as (N, C) in ``dtype``, added up in fp32 or, for fp64, in fp64.

    As ``x.mean((2, 3), dtype=dtype)``, whose gradient PyTorch lays out as if x were contiguous: on a CPU it takes
    several times as long to add that to the other gradients of a map in channels_last.

    Raises:
        TypeError: x is not floating point.
        ValueError: x does not have four dimensions.
    """
    require_map("global_average_pool", x)
    wide = torch.promote_types(dtype, torch.float32)  # a sum may be beyond what fp16 can hold
    if x.stride(1) == 1:
        total = x.permute(0, 2, 3, 1).sum((1, 2), dtype=wide)
    else:
        total = x.sum((2, 3), dtype=wide)
    return (total / (x.shape[2] * x.shape[3])).to(dtype)
