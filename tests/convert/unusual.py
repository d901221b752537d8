"""Small networks for the tests of unusual code, and what they are made of."""

from __future__ import annotations

import torch
from torch import nn


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def block(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = block(3, 8), block(8, 8, 2), block(8, 8), nn.Linear(8, 4)

    def features(self, x):
        return self.c(self.b(self.a(x))).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


class Shift(Base):
    """(N * 4, 3, H, W): a part of the channels comes from the frame before."""

    def features(self, x):
        x = self.a(x)
        clips = x.view(-1, 4, *x.shape[1:])
        x = torch.cat([clips.roll(1, 1)[:, :, :2], clips[:, :, 2:]], 2).flatten(0, 1)
        return self.c(self.b(x)).mean((2, 3)).view(-1, 4, 8).mean(1)


def residual(*blocks):
    return nn.Sequential(block(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
