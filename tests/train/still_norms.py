"""A small gated network that computes the same whether a batch is whole or divided."""

from __future__ import annotations

import torch

import gatedconv
from gatedconv.models import ResNet


class StillNorms(ResNet):
    """A gated network whose BatchNorm is in eval throughout: statistics of half a batch are others."""

    def train(self, mode: bool = True) -> StillNorms:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def still_network(gate: str) -> StillNorms:
    """A ResNet-8 for 8x8 images with gates of that kind at "middle", which decide differently for each image."""
    torch.manual_seed(1)
    model = StillNorms(8, 3, gate, "middle", input_size=(1, 8, 8))
    for found in gatedconv.gates(model).values():
        torch.nn.init.normal_(found.fc2.weight)
    return model
