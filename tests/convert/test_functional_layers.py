"""Convolutions written as functions of parameters that the model itself holds."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize("twice", [False, True])
def test_a_convolution_that_is_no_module_is_refused_by_name(twice):
    with pytest.raises(ValueError, match="no place for a 'channel' gate in Functional"):
        gatedconv.gate_model(Functional(twice).eval(), "channel", example_input=torch.zeros(2, 3, 8, 8))
