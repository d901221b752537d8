"""Shortcuts of residual blocks whose shape changes (He et al. 2016, section 3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, new channels zero, half of them in front; no parameters.

    Shape: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"stride={self.stride}, front={self.front}, back={self.back}"


def make_shortcut(in_channels: int, out_channels: int, stride: int, option: str) -> nn.Module | None:
    """None for an identity; else option "A" (padding) or "B" (1x1 convolution and BatchNorm)."""
    if stride == 1 and in_channels == out_channels:
        return None
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
