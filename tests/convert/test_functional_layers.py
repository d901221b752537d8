"""Convolutions written as functions of parameters that the model itself holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import gatedconv


class Functional(nn.Module):
    """Two convolutions on the model's own parameters; the second reads its weight twice where asked."""

    def __init__(self, twice=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.second = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.fc = nn.Linear(8, 5)
        self.twice = twice

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.first, self.bias, padding=1))
        x = F.relu(F.conv2d(x, self.second))
        return self.fc((F.relu(F.conv2d(x, self.second)) if self.twice else x).mean((2, 3)))


def test_a_parameter_of_the_model_is_no_shared_weight():
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = Functional().eval()
    gated = gatedconv.gate_model(model, "channel", example_input=images)
    torch.testing.assert_close(gated(images), model(images))
    masks = {name: torch.arange(gate.num_gates) % 3 == 0 for name, gate in gatedconv.gates(gated).items()}
    assert len(masks) == 2
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), images)
    x = F.relu(F.conv2d(images, model.first, model.bias, padding=1) * (torch.arange(8) % 3 == 0)[:, None, None])
    x = F.relu(F.conv2d(x, model.second) * (torch.arange(8) % 3 == 0)[:, None, None])
    torch.testing.assert_close(small(images), model.fc(x.mean((2, 3))))
    assert gatedconv.count_macs(small, images) < gatedconv.count_macs(model, images) / 2


def test_a_parameter_that_two_convolutions_read_is_shared():
    images = torch.zeros(2, 3, 8, 8)
    gated = gatedconv.gate_model(Functional(twice=True).eval(), "channel", example_input=images)
    assert len(gatedconv.gates(gated)) == 1
    assert sum("shared" in reason for reason in gated.conversion.skipped.values()) == 2
