"""What a closed residual branch leaves in a network of the user's own: nothing in a plan."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gatedconv
from tests.convert.unusual import block, images
from tests.tolerances import assert_close


class Block(nn.Module):
    """An identity and a branch, with a ReLU in front, behind, or neither."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.branch = nn.Sequential(block(channels, channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm(self.branch(torch.relu(x) if self.kind == "before" else x))
        total = x + inner if self.kind != "flipped" else inner + x
        return torch.relu(total) if self.kind in ("behind", "flipped") else total


class Net(nn.Module):
    """Blocks between a stem and a classifier, or alone."""

    def __init__(self, kind: str, count: int = 3, whole: bool = True) -> None:
        super().__init__()
        self.stem = block(3, 8) if whole else nn.Identity()
        self.blocks = nn.Sequential(*(Block(8, kind) for _ in range(count)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)) if whole else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


def compact(model: nn.Module, x: torch.Tensor, closed: set[int]) -> nn.Module:
    gated = gatedconv.gate_model(model.eval(), "layer", example_input=x)
    masks = {name: torch.tensor([i not in closed]) for i, name in enumerate(gatedconv.gates(gated))}
    assert len(masks) == len(model.blocks)
    return gatedconv.compact(gatedconv.freeze(gated, masks=masks).eval(), x).eval()


@pytest.mark.parametrize("kind", ["behind", "flipped", "before", "neither"])
@pytest.mark.parametrize("closed", [{0}, {1}, {2}, {0, 1, 2}])
def test_a_closed_branch_costs_nothing(kind, closed):
    x = images(2, 3, 12, 12)
    model = Net(kind)
    small = compact(model, x, closed)
    shorter = copy.deepcopy(model)
    shorter.blocks = nn.Sequential(*(b for i, b in enumerate(model.blocks) if i not in closed))
    (plan,), (expected,) = gatedconv.Engine(small, x).plans, gatedconv.Engine(shorter.eval(), x).plans
    assert [step.op for step in plan.steps] == [step.op for step in expected.steps]
    for size in ((2, 3, 12, 12), (3, 3, 17, 14)):
        with torch.no_grad():
            assert_close(gatedconv.Engine(small, x)(images(*size)), small(images(*size)))


@pytest.mark.parametrize("kind", ["behind", "neither"])
def test_a_network_of_closed_branches_alone(kind):
    x = images(2, 8, 12, 12)
    small = compact(Net(kind, whole=False), x, {0, 1, 2})
    with torch.no_grad():
        assert_close(gatedconv.Engine(small, x)(x), torch.relu(x) if kind == "behind" else x)
