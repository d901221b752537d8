"""Checks of arguments; each error begins with its owner, the function or class that was called."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def require_tensor(
    owner: str, name: str, tensor: Any, shape: Sequence[int] | None = None, device: torch.device | None = None
) -> None:
    """Check a floating point tensor; None accepts every shape, or every device.

    Raises:
        TypeError: no floating point tensor.
        ValueError: another shape or device.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{owner}: {name} must be a floating point tensor, got {found}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{owner}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{owner}: {name} must be on {device}, got {tensor.device}")


def require_map(owner: str, x: Any) -> None:
    """Check a floating point map x (N, C, H, W); raises as `require_tensor`."""
    require_tensor(owner, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{owner}: x must be (N, C, H, W), got shape {tuple(x.shape)}")


def require_choice(owner: str, name: str, value: Any, allowed: Collection[str | None]) -> None:
    """ValueError unless a value is one of those allowed."""
    if value not in tuple(allowed):  # a dict would require a hash of it
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
