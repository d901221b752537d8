"""Compact networks, with the small modules that choose their channels, run as one plan, exactly."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.nn import EmptyMap, Framed, GatherChannels, ScatterAdd, ScatterChannels
from tests.engine.nets import error, settle
from tests.tolerances import tolerance

LIMIT = tolerance()


def compacted(net, x, masks, **options):
    """The network with channel gates whose masks are `masks(number of gates)`, compact."""
    gated = gatedconv.gate_model(net, gate="channel", example_input=x, **options)
    chosen = {name: masks(gate.num_gates) for name, gate in gatedconv.gates(gated).items()}
    return gatedconv.compact(gatedconv.freeze(gated, masks=chosen), x)


def half(count):
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count)[: max(1, count // 2)]] = True
    return mask


def one(count):
    return torch.arange(count) == count - 1


def none(count):
    return torch.zeros(count, dtype=torch.bool)


def check(net, x, steps=None):
    engine = gatedconv.Engine(net, x, verify=False)
    assert len(engine.plans) == 1 and "Nothing is left to PyTorch" in engine.describe()
    if steps is not None:
        assert [step.op for step in engine.plans[0].steps[1:-1]] == steps
    for batch in (1, 3):
        other = torch.randn(batch, *x.shape[1:])
        assert error(engine(other), net, other) <= LIMIT
    return engine


NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121"]


@pytest.mark.parametrize(
    "name", ["shufflenet_v2_x1_0", *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS)]
)
def test_torchvision_half_pruned(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(8)
    x = torch.randn(1, 3, 48, 48)
    check(compacted(settle(getattr(torchvision.models, name)(num_classes=10)), x, half, position="middle"), x)


POSITIONS = ("before", "middle", "after")
KINDS = [("resnet18", half), ("resnet18", none), ("mobilenet_v3_small", half), ("mobilenet_v3_small", one)]
# Each position and each kind once; all pairs are slow.
PAIRS = [
    pytest.param(*kind, position, marks=[] if j == i % len(POSITIONS) else pytest.mark.slow)
    for i, kind in enumerate(KINDS)
    for j, position in enumerate(POSITIONS)
]


@pytest.mark.parametrize("name, masks, position", PAIRS)
def test_every_position(name, position, masks):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(9)
    x = torch.randn(1, 3, 40, 40)
    check(compacted(settle(getattr(torchvision.models, name)(num_classes=10)), x, masks, position=position), x)


def scattered(fill, index=(2, 0, 17), axis=1, size=20):
    shape = [1] * 4
    shape[axis] = size
    constants = torch.randn(shape) if fill else torch.zeros(shape)
    return ScatterChannels(torch.tensor(index), constants, axis)


class Stream(nn.Module):
    """A branch scattered among constants, added to a shortcut that is made before or after it."""

    def __init__(self, fill, late=False):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 3, 3, 1, 1), scattered(fill))
        self.shortcut, self.head, self.late = nn.Conv2d(4, 20, 1), nn.Conv2d(20, 5, 3, 1, 1), late

    def forward(self, x):
        if self.late:
            y = self.branch(x)
            y = y + self.shortcut(x)
        else:
            y = self.shortcut(x)
            y += self.branch(x)
        return self.head(torch.relu(y))


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_scattered_channels_are_added_in_one_pass(isa, fill, late):
    torch.manual_seed(10)
    engine = check(Stream(fill, late).eval(), torch.randn(1, 4, 7, 9))
    ops = [step.op for step in engine.plans[0].steps]
    assert ops.count("scatter_add") == 1 and "add" not in ops and len(ops) == 6


def test_scattered_channels_alone(isa):
    torch.manual_seed(11)
    net = nn.Sequential(nn.Conv2d(4, 3, 1), scattered(True), nn.SiLU(), GatherChannels(torch.tensor([17, 1, 2, 2])))
    check(net.eval(), torch.randn(1, 4, 5, 6), ["conv", "scatter_add", "gather"])


def test_vectors(isa):
    torch.manual_seed(12)
    fill = torch.randn(1, 40)
    net = nn.Sequential(
        nn.Conv2d(4, 30, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        GatherChannels(torch.tensor([29, 3, 11])),
        nn.Linear(3, 5),
        ScatterChannels(torch.tensor([39, 0, 7, 20, 16]), fill, axis=-1),
        nn.Linear(40, 4),
    )
    check(net.eval(), torch.randn(1, 4, 5, 6), ["conv", "mean_pool", "gather", "conv", "scatter_add", "conv"])


class ByPixel(nn.Module):
    """Channels chosen along the last axis, as in a pruned ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.first, self.take = nn.Conv2d(3, 20, 1), GatherChannels(torch.tensor([19, 0, 4]), -1)
        self.norm, self.linear = nn.LayerNorm(3), nn.Linear(3, 2)
        self.put, self.add = scattered(True, (5, 19), axis=3), ScatterAdd(torch.tensor([1, 18]), 3)

    def forward(self, x):
        x = self.first(x).permute(0, 2, 3, 1)
        y = self.linear(self.norm(self.take(x)))
        return (self.put(y) * self.add(x, y)).permute(0, 3, 1, 2)


def test_channels_last(isa):
    torch.manual_seed(13)
    check(ByPixel().eval(), torch.randn(1, 3, 5, 6))


@pytest.mark.parametrize("kernel, stride, padding, dilation", [(3, 1, 1, 1), (3, 2, 0, 1), (5, 2, 3, 2), (1, 1, 0, 1)])
def test_what_is_left_of_a_convolution_without_outputs(isa, kernel, stride, padding, dilation):
    torch.manual_seed(14)
    empty = EmptyMap(0, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
    scatter = ScatterChannels(torch.zeros(0, dtype=torch.long), torch.randn(1, 20, 1, 1))
    layers = {"layer": empty, "scatter": scatter}
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Framed(OrderedDict(layers)), nn.ReLU(), nn.Conv2d(20, 3, 1)).eval()
    engine = check(net, torch.randn(1, 3, 11, 12), ["conv", "fill", "conv"])
    other = torch.randn(2, 3, 17, 15)
    assert error(engine(other), net, other) <= LIMIT


def test_channels_of_a_flattened_map_stay_in_pytorch():
    torch.manual_seed(15)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), GatherChannels(torch.arange(0, 24, 2)), nn.Linear(12, 2))
    x = torch.randn(2, 3, 2, 3)
    engine = gatedconv.Engine(net.eval(), x)
    assert engine.reason is None and error(engine(x), net, x) <= LIMIT


def test_an_activation_of_a_flattened_map():
    torch.manual_seed(16)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.SiLU(), nn.Linear(24, 2)).eval()
    x = torch.randn(2, 3, 2, 3)
    engine = gatedconv.Engine(net, x)
    assert engine.reason is None and error(engine(x), net, x) <= LIMIT
