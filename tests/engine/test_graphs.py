"""Networks whose code no symbolic tracer follows run natively; what holds at one size alone is right at all."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gatedconv
from gatedconv.convert.verify import tensors_of
from gatedconv.deploy.graph_writer import NoGraph
from gatedconv.engine.lower import lower
from tests.engine.nets import error, settle
from tests.tolerances import assert_close, relative_error, tolerance


class Checked(nn.Module):
    """Code that looks at shapes, counts its layers, goes through the parts of a chunk, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU(inplace=True))
        self.branches = nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 2:
            raise ValueError(f"no images: {tuple(x.shape)}")
        parts = self.stem(x).chunk(len(self.branches), dim=1)
        done = []
        for branch, part in zip(self.branches, parts, strict=True):
            done.append(branch(part + done[-1] if done else part))
        x = torch.cat(done, 1)
        if len(x) > 0 and x.shape[2] == x.shape[3]:
            x = x.contiguous()
        return {"logits": self.head(x.mean((2, 3))), "classes": self.head.out_features}


class Shaped(nn.Module):
    """Vectors and maps by whatever spelling, with sizes worked out by Python."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.LayerNorm(16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(x)
        batch, channels, height, width = map(int, x.shape)
        pixels = self.mix(self.norm(x.permute(0, 2, 3, 1).contiguous()))
        assert list(pixels.shape) == [batch, height, width, channels]
        x = x + pixels.permute(0, 3, 1, 2)
        small = F.max_pool2d(x, 2, ceil_mode=True)
        up = F.interpolate(small, size=(height, width), mode="nearest")
        x = (
            (x + up)
            .view(batch, 4, channels // 4, height, width)
            .transpose(1, 2)
            .reshape(batch, channels, height, width)
        )
        return self.head(F.adaptive_avg_pool2d(x, 1).reshape(batch, channels))


@pytest.mark.parametrize("make", [Checked, Shaped])
def test_code_that_no_tracer_follows_gets_one_plan(make):
    torch.manual_seed(0)
    net = settle(make())
    with pytest.raises(Exception):  # noqa: B017
        fx.symbolic_trace(net)
    engine = gatedconv.Engine(net, torch.randn(1, 3, 16, 16))
    assert len(engine.plans) == 1 and "Nothing is left to PyTorch" in engine.describe()
    for size in ((16, 16), (9, 22), (64, 48)):
        for batch in (1, 3):
            x = torch.randn(batch, 3, *size)
            found, wanted = engine(x), net(x)
            assert type(found) is type(wanted)
            if make is Checked:
                assert list(found) == ["logits", "classes"] and found["classes"] == 5
                found, wanted = found["logits"], wanted["logits"]
            assert relative_error(found, wanted) <= tolerance()


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Result:
    logits: Tensor
    maps: list
    name: str = "x"


class Returning(nn.Module):
    def __init__(self, collect):
        super().__init__()
        self.a, self.b, self.collect = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), collect

    def forward(self, x):
        x = self.a(x)
        return self.collect(x, self.b(x.relu()))


STRUCTURES = {
    "tuple": lambda a, b: (a, (b, a)),
    "list": lambda a, b: [a, [b], 3],
    "dict": lambda a, b: {"a": a, "more": [b, None]},
    "named tuple": Pair,
    "dataclass": lambda a, b: Result(a, [b, a]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_result_has_the_models_structure(name):
    net = Returning(STRUCTURES[name]).eval()
    engine = gatedconv.Engine(net, torch.randn(1, 3, 8, 8))
    assert engine.plans
    x = torch.randn(2, 3, 9, 8)
    found, wanted = engine(x), net(x)
    assert type(found) is type(wanted)
    for one, other in zip(tensors_of(found), tensors_of(wanted), strict=True):
        assert relative_error(one, other) <= tolerance()
    if name == "list":
        assert type(found[1]) is list and found[2] == 3


def test_a_result_of_another_class_comes_from_the_model():
    class Other:
        def __init__(self, a, b):
            self.a, self.b = a, b

    net = Returning(Other).eval()
    engine = gatedconv.Engine(net, torch.randn(1, 3, 8, 8))
    assert "it returns a Other" in engine.reason
    assert isinstance(engine(torch.randn(1, 3, 8, 8)), Other)


class SamePadding(nn.Module):
    """Padding by Python so that a stride of 2 halves any size, rounded up."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        more = [max((math.ceil(side / 2) - 1) * 2 + 3 - side, 0) for side in x.shape[2:]]
        x = F.pad(x, (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2))
        return self.last(torch.relu(self.first(x)))


def test_a_graph_of_one_size(tmp_path):
    torch.manual_seed(1)
    net = SamePadding().eval()
    engine = gatedconv.Engine(net, torch.randn(1, 3, 32, 32))
    assert len(engine.plans) == 1 and engine.fixed_size == (3, 32, 32)
    assert "Inputs of other sizes than 3 x 32 x 32 run in PyTorch." in engine.describe()
    for size in ((32, 32), (33, 47), (1, 1), (32, 64)):
        x = torch.randn(2, 3, *size)
        assert error(engine(x), net, x) <= tolerance()
    with pytest.raises(ValueError, match="for images of 3 x 32 x 32 alone"):
        gatedconv.export(engine, tmp_path / "net.plan", torch.randn(1, 3, 32, 32), format="plan")
    assert not list(tmp_path.iterdir())


class Varying(nn.Module):
    """A convolution whose output goes through code that differs with the size of the images, or their number."""

    def __init__(self, code):
        super().__init__()
        self.code, self.conv = code, nn.Conv2d(3, 4, 3, 1, 1)
        self.small, self.large = (nn.Parameter(torch.randn(4, 4, 1, 1)) for _ in range(2))

    def forward(self, x):
        return self.code(self, self.conv(x))


VARYING = {
    "a factor": lambda net, x: F.interpolate(x, scale_factor=64 / x.shape[-1], mode="nearest"),
    "weights": lambda net, x: F.conv2d(x, net.small if x.shape[-1] < 64 else net.large),
    "constants": lambda net, x: x * torch.tensor([2.0 if x.shape[-1] < 64 else 3.0]),
    "operands": lambda net, x: (lambda a, b: torch.relu(a if x.shape[-1] < 64 else b))(x + 1, x - 1),
    "a smaller grid": lambda net, x: F.adaptive_avg_pool2d(x, min(x.shape[-1], 32)),
    "larger images": lambda net, x: F.interpolate(x, 32) if x.shape[-1] < 32 else x,
    "channels": lambda net, x: x[:, : x.shape[2] // 16],
    "pixels": lambda net, x: (
        F.max_pool2d(x, 32).flatten(1).softmax(1).view(x.shape[0], 4, *(n // 32 for n in x.shape[2:]))
    ),
    "one image": lambda net, x: x.relu() if len(x) == 1 else x.sigmoid(),
}


@pytest.mark.parametrize("name", VARYING)
def test_what_varies_with_the_size_is_right_without_verification(name):
    torch.manual_seed(2)
    net = Varying(VARYING[name]).eval()
    engine = gatedconv.Engine(net, torch.randn(2, 3, 32, 32), verify=False)
    for shape in ((2, 3, 32, 32), (1, 3, 32, 32), (3, 3, 32, 64), (2, 3, 96, 96), (2, 3, 16, 16)):
        x = torch.randn(shape)
        try:
            wanted = net(x)
        except RuntimeError:
            continue
        assert relative_error(engine(x), wanted) <= tolerance(), shape


@pytest.mark.parametrize("take", [lambda x: x.tolist(), lambda x: x.numpy(), lambda x: np.asarray(x), float])
def test_code_that_takes_numbers_of_its_input_has_no_graph(take):
    def code(net, x):
        return x.relu() if np.max(take(x.abs().amax())) > 5 else -x

    net = Varying(code).eval().requires_grad_(False)
    engine = gatedconv.Engine(net, torch.randn(1, 3, 8, 8), verify=False)
    assert "reads numbers of a tensor" in engine.reason and "tolist" not in vars(Tensor)
    for factor in (0.1, 100.0):
        x = factor * torch.randn(1, 3, 8, 8)
        assert torch.equal(engine(x), net(x))


CASTS = {
    "float": lambda net, x: x.float().square().mean((2, 3)),
    "to its dtype": lambda net, x: (x > 0).to(x.dtype) * x,
    "none": lambda net, x: F.layer_norm(x.relu().softmax(1), x.shape[3:]),
}


@pytest.mark.parametrize("name", CASTS)
def test_code_that_converts_dtypes_has_no_graph_in_half_precision(name):
    net, x = Varying(CASTS[name]).eval(), torch.randn(1, 3, 8, 8).half()
    if name == "none":
        assert lower(net, x).graph.nodes
    else:
        with pytest.raises(NoGraph, match="converts dtypes"):
            lower(net, x)


def test_comparisons_in_place_have_no_graph():
    net = Varying(lambda net, x: x.clone().gt_(0) + x.clone().gt_(0)).eval()
    engine = gatedconv.Engine(net, torch.randn(1, 3, 8, 8))
    x = torch.randn(1, 3, 8, 8)
    assert "gt_" in engine.reason and torch.equal(engine(x), net(x))


class BySize(nn.Module):
    """Takes another path for large images, or for many."""

    def __init__(self, dimension, limit):
        super().__init__()
        self.conv, self.dimension, self.limit = nn.Conv2d(3, 8, 3, padding=1), dimension, limit

    def forward(self, x):
        x = x * 2 if x.shape[self.dimension] > self.limit else x
        return self.conv(x).relu().mean((2, 3))


def test_code_that_branches_far_from_the_example_runs_in_pytorch_there():
    example = torch.randn(2, 3, 32, 32)
    for dimension, limit, x in ((3, 200, torch.randn(1, 3, 224, 224)), (0, 16, torch.randn(20, 3, 32, 32))):
        model = BySize(dimension, limit).eval()
        engine = gatedconv.Engine(model, example)
        for images in (example, x):
            assert_close(engine(images), model(images))
