"""The mean of a feature map, which is what a gate reads of it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["global_average_pool"]


def global_average_pool(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of x (N, C, H, W) over H and W, as (N, C), added up and returned in ``dtype``.

    As ``x.mean((2, 3), dtype=dtype)``, whose gradient PyTorch lays out as if x were contiguous: on a CPU it takes
    several times as long to add that to the other gradients of a map in channels_last.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        total = x.permute(0, 2, 3, 1).sum((1, 2), dtype=dtype)
    else:
        total = x.sum((2, 3), dtype=dtype)
    return total / (x.shape[2] * x.shape[3])
