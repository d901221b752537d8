"""Networks as people write them: the class, its code and its state survive; outputs are never gated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from gatedconv.convert import ConversionError
from tests.convert.networks import IMAGES
from tests.tolerances import assert_close

ODD = torch.arange(64) % 3 != 1


def block(i, o, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), norm(o), nn.ReLU())


class Base(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.a, self.b, self.fc = block(3, 8, norm), block(8, 8, norm), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.b(self.a(x)).mean((2, 3)))


class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.fc(self.b(x).mean((2, 3)))


class View(Base):
    def forward(self, x):
        x = self.a(x).clone()
        x[:, 4:].mul_(0.1)
        return self.fc(self.b(x).mean((2, 3)))


class Chunks(Base):
    def forward(self, x):
        parts = list(self.a(x).chunk(2, 1))
        return self.fc(self.b(torch.cat([parts[1], parts[0]], 1)).mean((2, 3)))


class Resized(Base):
    def forward(self, x):
        h, w = x.shape[-2:]
        if h < 16:
            x = F.interpolate(x, scale_factor=2.0)
        return self.fc(F.interpolate(self.b(self.a(x)), size=(h, w)).mean((2, 3)))


@dataclasses.dataclass
class Scores:
    scores: torch.Tensor


class Dataclass(Base):
    def forward(self, x):
        return Scores(super().forward(x))


def masks_of(gated):
    return {name: ODD[: gate.num_gates] for name, gate in gatedconv.gates(gated).items()}


def out(result):
    return result.scores if isinstance(result, Scores) else result


@torch.no_grad()
@pytest.mark.parametrize("kind", [Base, NoGrad, View, Chunks, Resized, Dataclass])
def test_the_class_is_kept_and_every_step_is_exact(kind):
    torch.manual_seed(0)
    model = kind().eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    frozen = gatedconv.freeze(gated, masks=masks_of(gated))
    small = gatedconv.compact(frozen, IMAGES)
    assert type(gated) is type(small) is kind
    larger = torch.randn(3, 3, 20, 24)
    for x in (IMAGES, larger):
        assert torch.equal(out(gated(x)), out(model(x)))
        assert_close(out(small(x)), out(frozen(x)))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_gates_that_no_gradient_reaches_are_named():
    torch.manual_seed(0)
    found = gatedconv.gate_model(NoGrad(), "channel", example_input=IMAGES).conversion
    assert found.note == "no gradient reaches a.1.channel_gate: they stay as they are"
    assert not gatedconv.gate_model(Base(), "channel", example_input=IMAGES).conversion.note


@pytest.mark.parametrize(
    "norm",
    [
        lambda c: nn.GroupNorm(2, c),
        lambda c: nn.InstanceNorm2d(c, affine=True),
        lambda c: nn.BatchNorm2d(c, affine=False),
        nn.SyncBatchNorm,
    ],
)
def test_gates_are_behind_norms_of_any_class(norm):
    model = Base(norm).eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert list(gatedconv.gates(gated)) == ["a.1.channel_gate", "b.1.channel_gate"]
    frozen = gatedconv.freeze(gated, masks=masks_of(gated))
    with torch.no_grad():
        assert_close(gatedconv.compact(frozen, IMAGES)(IMAGES), frozen(IMAGES))


class Heads(Base):
    def __init__(self, style):
        super().__init__()
        self.box, self.cls, self.style = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), style

    def forward(self, x):
        x = self.b(self.a(x))
        box, cls = self.box(x), self.cls(x)
        if self.style == "cat":
            return torch.cat([box, cls], 1).flatten(2)
        if self.style == "permute":
            return box.permute(0, 2, 3, 1).reshape(len(x), -1, 4), cls.softmax(1)
        return {"peaks": cls.sigmoid() * (F.max_pool2d(cls, 3, 1, 1) == cls), "box": F.interpolate(box, scale_factor=2)}


@pytest.mark.parametrize("style", ["cat", "permute", "peaks"])
def test_what_reaches_an_output_is_gated_only_by_name(style):
    model = Heads(style).eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert not [n for n in gatedconv.gates(gated) if n.startswith(("box", "cls"))]
    with pytest.warns(UserWarning, match="include names it"):
        forced = gatedconv.gate_model(model, "channel", example_input=IMAGES, include=["cls"])
    assert list(gatedconv.gates(forced)) == ["cls.channel_gate"]


def test_keyword_inputs_and_tuples():
    class Two(Base):
        def forward(self, x, scale=None):
            return super().forward(x if scale is None else x * scale)

    model = Two().eval()
    for example in ((IMAGES, torch.ones(1)), {"x": IMAGES, "scale": torch.ones(1)}):
        assert len(gatedconv.gates(gatedconv.gate_model(model, "channel", example_input=example))) == 2


def test_a_difference_names_the_first_layer():
    model = Base().eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    frozen = gatedconv.freeze(gated, masks=masks_of(gated))
    other = gatedconv.freeze(gated, masks={n: ~m for n, m in masks_of(gated).items()})
    with pytest.raises(ConversionError, match=r"test: the result differs by .* first at a\.0|a\.1"):
        gatedconv.convert.require_same(frozen, other, IMAGES, "test")


class Grouped(nn.Module):
    """A grouped convolution whose input is gated behind norm and activation."""

    def __init__(self, groups):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, groups=groups)
        self.d, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 4)
        nn.init.normal_(self.b.bias)  # what fills up a group is no zero behind the norm
        nn.init.normal_(self.d.bias)

    def forward(self, x):
        return self.fc(self.d(self.c(self.b(self.a(x)).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize("groups", [2, 4, 16])
@pytest.mark.parametrize("position", ["before", "middle", "after"])
@pytest.mark.parametrize("seed", range(3))
def test_groups_of_unequal_size_stay_exact(groups, position, seed):
    torch.manual_seed(seed)
    model = Grouped(groups).eval()
    gated = gatedconv.gate_model(model, "channel", position=position, example_input=IMAGES)
    masks = {name: torch.rand(gate.num_gates) < 0.5 for name, gate in gatedconv.gates(gated).items()}
    frozen = gatedconv.freeze(gated, masks=masks)
    with torch.no_grad():
        assert_close(gatedconv.compact(frozen, IMAGES)(IMAGES), frozen(IMAGES))
