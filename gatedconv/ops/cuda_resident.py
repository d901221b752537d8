"""The resident driver of the CUDA library: whether it may run here, and the call that a plan makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatedconv.ops import cuda_conv

__all__ = ["Limits", "limits", "resident_run"]


@dataclass(frozen=True)
class Limits:
    """What a GPU gives a block.

    Attributes:
        shared_bytes: Shared memory, of those that ask for more than 48 KiB.
        ranks: Numbers of blocks that can share an image, 1 first.
    """

    shared_bytes: int
    ranks: tuple[int, ...]


def limits(device: torch.device, dtype: torch.dtype) -> Limits | None:
    """Return the limits of a device, None where the driver does not serve it or the dtype.

    It multiplies on tensor cores alone: float32 only where PyTorch's own settings allow tf32.
    """
    if device.type != "cuda":
        return None
    if not cuda_conv.takes(torch.empty(0, dtype=dtype, device=device), (1, 1), (1, 1), 1):
        return None
    properties = torch.cuda.get_device_properties(device)
    if dtype == torch.float32 and (properties.major < 8 or not cuda_conv.allows_tf32()):
        return None
    return Limits(properties.shared_memory_per_block_optin, (1, 2, 4, 8) if properties.major >= 9 else (1,))


def resident_run(input: Tensor, stream: Tensor, output: Tensor, layout: Sequence[int], tf32: bool) -> Tensor:
    """Take every image of `input` through a run of layers, write `output` and return it; see csrc/shared/resident.h."""
    torch.ops.gatedconv.resident_run.default(input, stream, output, layout, tf32)
    return output
