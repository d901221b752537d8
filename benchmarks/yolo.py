"""YOLOv8's backbone and neck, as Ultralytics publishes its layers, of any width; without its head and its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvAct(nn.Sequential):
    """Convolution, norm, SiLU: (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class C2f(nn.Module):
    """YOLOv8's block: half of the channels through bottlenecks, every result in the concatenation."""

    def __init__(self, inputs: int, outputs: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.last = ConvAct(inputs, outputs), ConvAct((2 + depth) * half, outputs)
        self.blocks = nn.ModuleList(nn.Sequential(ConvAct(half, half, 3), ConvAct(half, half, 3)) for _ in range(depth))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.shortcut else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Backbone and neck, the maps for the head joined as one; width 16 is YOLOv8n's.

    Shape: (N, 3, H, W), sides multiples of 32 -> (N, 8 * width, H / 16, W / 16).
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(ConvAct(3, w, 3, 2), ConvAct(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, 1, True))
        self.p3 = nn.Sequential(ConvAct(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, 2, True))
        self.p4 = nn.Sequential(ConvAct(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, 2, True))
        self.p5 = nn.Sequential(ConvAct(8 * w, 16 * w, 3, 2), C2f(16 * w, 16 * w, 1, True))
        self.squeeze, self.spread = ConvAct(16 * w, 8 * w), ConvAct(32 * w, 16 * w)
        self.up4, self.up3 = C2f(24 * w, 8 * w, 1, False), C2f(12 * w, 4 * w, 1, False)
        self.to4, self.down4 = ConvAct(4 * w, 4 * w, 3, 2), C2f(12 * w, 8 * w, 1, False)
        self.pool, self.up = nn.MaxPool2d(5, 1, 2), nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        parts = [self.squeeze(self.p5(p4))]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        p5 = self.spread(torch.cat(parts, 1))
        n4 = self.up4(torch.cat([self.up(p5), p4], 1))
        n3 = self.up3(torch.cat([self.up(n4), p3], 1))
        return self.down4(torch.cat([self.to4(n3), n4], 1))
