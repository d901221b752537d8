"""Group norms: one gate for each group, whose channels go together, on both sides of the norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from tests.oracle import random_masks
from tests.tolerances import assert_close

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Norms(nn.Module):
    """Three convolutions, two norms of 4 groups behind them."""

    def __init__(self, affine: bool = True):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16, affine=affine)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(4, 24, affine=affine)
        self.head = nn.Conv2d(24, 5, 1)
        for parameter in (*self.norm1.parameters(), *self.norm2.parameters()):
            nn.init.normal_(parameter)

    def forward(self, x):
        x = F.silu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(x)))).mean((2, 3))


def masked(model, images, masks):
    """The dense network with the groups of its norms masked, written out."""
    x = images
    for n, act in ((1, F.silu), (2, F.relu)):
        x = model.get_submodule(f"norm{n}")(model.get_submodule(f"conv{n}")(x))
        groups = x.reshape(len(x), 4, -1) * masks[f"norm{n}.channel_gate"].to(x)[:, None]
        x = act(groups.reshape(x.shape))
    return model.head(x).mean((2, 3))


@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_closed_groups_go_on_both_sides_of_the_norm(affine):
    model = Norms(affine).eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert {n: g.num_gates for n, g in gatedconv.gates(gated).items()} == dict.fromkeys(
        ("norm1.channel_gate", "norm2.channel_gate"), 4
    )
    assert gated.conversion.gated["norm1.channel_gate"] == "the output channels of conv1, in 4 groups"
    masks = {
        "norm1.channel_gate": torch.tensor([True, False, True, False]),
        "norm2.channel_gate": torch.tensor([False, False, True, False]),
    }
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    for result in (frozen, small, gatedconv.Engine(frozen, IMAGES), gatedconv.Engine(small, IMAGES)):
        assert_close(result(IMAGES), masked(model, IMAGES, masks))
    assert (small.conv1.out_channels, small.conv2.in_channels, small.conv2.out_channels) == (8, 8, 6)
    assert (small.norm1.num_groups, small.norm1.num_channels, small.norm2.num_groups) == (2, 8, 1)
    rates = {name: mask.double() for name, mask in masks.items()}
    left = gatedconv.count_macs(small, IMAGES[:1])
    assert float(gatedconv.expected_macs(gated, rates)) == left and not gated.conversion.estimated
    assert gatedconv.count_macs(frozen, IMAGES[:1]) < 0.35 * gatedconv.count_macs(model, IMAGES[:1])


def test_they_train_and_come_back_from_files(tmp_path):
    gated = gatedconv.gate_model(Norms(), "channel", example_input=IMAGES, position="middle").train()
    names = [f"{name}.channel_gate" for name in ("conv2", "head")]
    assert list(gatedconv.gates(gated)) == names and [g.num_gates for g in gatedconv.gates(gated).values()] == [4, 4]
    (gated(IMAGES).square().mean() + gatedconv.mac_target_loss(gated, 0.5)).backward()
    assert all(g.fc2.bias.grad.abs().sum() > 0 for g in gatedconv.gates(gated).values())
    masks = random_masks(dict.fromkeys(names, 4), "odd", 3)
    frozen = gatedconv.freeze(gated.eval(), masks=masks)
    for stage in (gated, frozen, gatedconv.compact(frozen, IMAGES)):
        gatedconv.save(stage, tmp_path / "m")
        for loaded in (gatedconv.load(tmp_path / "m"), gatedconv.load(tmp_path / "m", into=Norms())):
            with torch.no_grad():
                assert_close(loaded(IMAGES), stage.eval()(IMAGES))


def test_a_batch_norm_may_follow_the_gates_of_a_group_norm():
    class Depthwise(Norms):
        def __init__(self):
            super().__init__()
            self.deep, self.deepnorm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)

        def forward(self, x):
            x = F.relu(self.norm1(self.conv1(x)))
            x = F.relu(self.norm2(self.conv2(F.relu(self.deepnorm(self.deep(x))))))
            return self.head(x).mean((2, 3))

    gated = gatedconv.gate_model(Depthwise().eval(), "channel", example_input=IMAGES)
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(gated).items()}, "odd", 3)
    assert masks["norm1.channel_gate"].shape == (4,)
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    assert small.deep.groups == small.conv1.out_channels == 4 * int(masks["norm1.channel_gate"].sum())
    closed = (~masks["norm1.channel_gate"]).nonzero().flatten() * 4
    assert frozen.deepnorm.weight[closed].abs().max() == 0
    with torch.no_grad():
        assert_close(small(IMAGES), frozen(IMAGES))


def test_widths_are_filled_up_with_whole_groups():
    gated = gatedconv.gate_model(Norms(), "channel", example_input=IMAGES).eval()
    masks = {name: torch.tensor([False, True, False, False]) for name in gatedconv.gates(gated)}
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, IMAGES, channel_multiple=8)
    assert (small.conv1.out_channels, small.conv2.out_channels) == (8, 24)  # groups of 4 and of 6 channels
    with torch.no_grad():
        assert_close(small(IMAGES), frozen(IMAGES))


def test_a_norm_that_is_called_twice_keeps_its_channels():
    class Twice(Norms):
        def forward(self, x):
            x = F.relu(self.norm1(self.conv1(x)))
            return self.head(F.relu(self.norm2(self.conv2(self.norm1(x))))).mean((2, 3))

    gated = gatedconv.gate_model(Twice().eval(), "channel", example_input=IMAGES)
    assert list(gatedconv.gates(gated)) == ["norm2.channel_gate"]
    masks = {"norm2.channel_gate": torch.tensor([False, True, True, False])}
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    assert small.norm1.num_channels == 16 and small.norm2.num_channels == 12
    with torch.no_grad():
        assert_close(small(IMAGES), frozen(IMAGES))


@pytest.mark.parametrize("norm", ["of one group", "by a function"])
def test_where_the_groups_are_no_module_s_every_channel_has_a_gate(norm):
    class Other(Norms):
        def forward(self, x):
            x = self.conv1(x)
            x = self.norm1(x) if norm == "of one group" else F.group_norm(x, 4)
            return self.head(F.relu(self.norm2(self.conv2(F.relu(x))))).mean((2, 3))

    model = Other().eval()
    model.norm1 = nn.GroupNorm(1, 16)
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert sorted(g.num_gates for g in gatedconv.gates(gated).values()) == [4, 16]
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(gated).items()}, "odd", 5)
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, IMAGES)
    with torch.no_grad():
        assert_close(small(IMAGES), frozen(IMAGES))
