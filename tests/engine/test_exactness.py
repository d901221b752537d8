"""The engine computes what the model computes: max|a - b| / max|b| <= 1e-5 against float64."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gatedconv
from tests.engine.nets import ISAS, Residual, error, settle, supported
from tests.tolerances import assert_close, assert_no_worse, tolerance

LIMIT = tolerance()


def is_native(engine):
    return engine.reason is None and "Nothing is left to PyTorch" in engine.describe()


@pytest.mark.parametrize("position", ["after", "middle", "before"])
@pytest.mark.parametrize("mask", ["open", "closed", "one", "odd"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_gated_resnet(position, mask, shortcut):
    model = settle(gatedconv.models.resnet20(gate="channel", position=position, shortcut=shortcut))
    masks = {}
    for name, gate in gatedconv.gates(model).items():
        chosen = torch.rand(gate.num_gates) < 0.45
        if mask in ("open", "closed"):
            chosen[:] = mask == "open"
        elif mask == "one":
            chosen[:] = False
            chosen[gate.num_gates // 3] = True
        masks[name] = chosen
    frozen = gatedconv.freeze(model, masks=masks)
    x = torch.randn(3, 3, 20, 28)
    engine = gatedconv.Engine(frozen, x)
    assert error(engine(x), frozen, x) <= LIMIT
    assert is_native(engine)
    if (position, mask) == ("before", "closed"):
        assert any(step.op == "fill" for step in engine.plans[0].steps)


def test_a_resnet_compacted_by_layer_gates():
    model = settle(gatedconv.models.resnet32(gate="layer"))
    masks = {name: torch.tensor([i % 2 == 0]) for i, name in enumerate(gatedconv.gates(model))}
    frozen = gatedconv.freeze(model, masks=masks)
    x = torch.randn(5, 3, 32, 32)
    engine = gatedconv.Engine(frozen, x)
    assert is_native(engine)
    assert error(engine(x), frozen, x) <= LIMIT


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision").models
    model = settle(getattr(models, name)(num_classes=10))
    x = torch.randn(2, 3, 40, 64)
    engine = gatedconv.Engine(model, x)
    assert is_native(engine)
    assert error(engine(x), model, x) <= LIMIT


@pytest.mark.parametrize("kernel", ["conv", "winograd2", "winograd4"])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 14), (1, 1), (33, 6)])
def test_every_3x3_algorithm(isa, kernel, size, monkeypatch):
    monkeypatch.setattr("gatedconv.engine.engine.choose_estimated", lambda *_: kernel)
    model = settle(nn.Sequential(nn.Conv2d(3, 11, 1), Residual(11, 37), Residual(11, 5), nn.Conv2d(11, 50, 3, 1, 1)))
    x = torch.randn(3, 3, *size)
    engine = gatedconv.Engine(model, x)
    assert sum(step.op == kernel for step in engine.plans[0].steps) >= 5
    assert error(engine(x), model, x) <= LIMIT


@pytest.mark.parametrize(("groups", "kernel", "stride", "dilation"), [(2, 3, 1, 1), (3, 3, 2, 1), (9, (1, 4), 3, 2)])
def test_groups_of_eight(isa, groups, kernel, stride, dilation):
    channels = 8 * groups
    conv = nn.Conv2d(channels, channels, kernel, stride, 3, dilation, groups)
    model = settle(nn.Sequential(nn.Conv2d(3, channels, 1), conv, nn.SiLU(), Residual(channels, 7)))
    x = torch.randn(3, 3, 19, 31)
    engine = gatedconv.Engine(model, x)
    assert is_native(engine)
    assert error(engine(x), model, x) <= LIMIT


class Expanded(nn.Module):
    """Layers that read nothing else, after some that make a gate or a residual."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.first, self.squeeze = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 96, 1)
        self.wide = nn.Sequential(nn.Conv2d(32, 96, 1), nn.ReLU6(), nn.Conv2d(96, 96, 3, 1, 1, groups=96), nn.SiLU())
        self.last = nn.Conv2d(96, 32, 1)

    def forward(self, x):
        x = self.first(x)
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        y = self.wide(x)
        return self.last(y * gate) if self.extra == "gate" else x + self.last(y)


# Networks, with the number of layers that the next one reads band by band: their maps are too large for the largest
# second-level cache that plans reckon with (2 MiB), and their rows under a window fit into the smallest (0.5 MiB).
LARGE = {
    "mobile": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU6(), nn.Conv2d(40, 40, 5, 2, 2, groups=40), nn.SiLU()),
            *(nn.MaxPool2d(3, 1, 1), nn.Conv2d(40, 16, 1), Residual(16, 8)),
        ),
        1,
    ),
    "groups of 8": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 48, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, 2, 1, groups=6), nn.Conv2d(48, 9, 1)
        ),
        1,
    ),
    "stride": (lambda: nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 8, 1, 4)), 1),
    "gate": (lambda: Expanded("gate"), 2),
    "residual": (lambda: Expanded("residual"), 2),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_maps_run_band_by_band(isa, name, dtype):
    """With two and three threads parts begin in the middle of an image."""
    build, joined = LARGE[name]
    model, x = settle(build()), torch.randn(2, 3, 161, 66)
    engines = [gatedconv.Engine(model, x, threads=threads, dtype=dtype) for threads in (1, 2, 3)]
    assert is_native(engines[0])
    assert engines[0].describe().count("read band by band") >= joined
    results = [engine(x) for engine in engines]
    if dtype == torch.float32:
        assert error(results[0], model, x) <= LIMIT
    else:
        plain = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert_no_worse(results[0], plain, copy.deepcopy(model).double()(x.double()), name)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(engines[2](x[1:]), results[0][1:])


@st.composite
def convolutions(draw):
    """A convolution and an input that it accepts."""
    kernel, dilation = (draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) for _ in range(2))
    dilation = tuple(min(d, 3) for d in dilation)
    stride, padding = (1, 1), draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = draw(st.integers(1, 4))
    channels, outputs = draw(st.integers(1, 35)) * groups, draw(st.integers(1, 40)) * groups
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = padding if isinstance(padding, tuple) else (0, 0)
    least = [1 if padding == "same" else max(1, e - 2 * p) for e, p in zip(extent, pads, strict=True)]
    size = [low + draw(st.integers(0, 16)) for low in least]
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()))
    return conv, torch.randn(draw(st.integers(1, 4)), channels, *size)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=convolutions(), relu=st.booleans(), isa=st.sampled_from([isa for isa in ISAS if supported(isa)]))
def test_any_convolution(case, relu, isa, monkeypatch):
    monkeypatch.setenv("GATEDCONV_ISA", isa)
    conv, x = case
    model = nn.Sequential(conv, nn.ReLU()) if relu else nn.Sequential(conv)
    engine = gatedconv.Engine(model, x)
    assert is_native(engine)
    result = engine(x)
    with torch.no_grad():
        exact = model.double()(x.double())
    assert (result - exact).abs().max() <= LIMIT * max(float(exact.abs().max()), 1e-3)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    size=st.integers(4, 15),
    channels=st.integers(1, 20),
    kind=st.sampled_from(["max", "avg", "avg_inside"]),
    data=st.data(),
)
def test_any_pooling(kernel, stride, size, channels, kind, data):
    padding = data.draw(st.integers(0, kernel // 2))
    pool = {
        "max": nn.MaxPool2d(kernel, stride, padding),
        "avg": nn.AvgPool2d(kernel, stride, padding),
        "avg_inside": nn.AvgPool2d(kernel, stride, padding, count_include_pad=False),
    }[kind]
    model = nn.Sequential(nn.Conv2d(2, channels, 1), pool, nn.Conv2d(channels, 3, 1))
    x = torch.randn(2, 2, size, size + 1)
    engine = gatedconv.Engine(model, x)
    assert is_native(engine)
    assert error(engine(x), model, x) <= LIMIT


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(3)
    model = settle(gatedconv.models.resnet20())
    return model, gatedconv.Engine(model, torch.zeros(1, 3, 12, 16))


@pytest.mark.parametrize("batch", [1, 3, 33])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_way_to_share_a_batch(isa, small, batch, threads):
    model, engine = small
    x = torch.randn(batch, 3, 12, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = engine(x)
    finally:
        torch.set_num_threads(before)
    assert error(result, model, x) <= LIMIT


def test_maps_too_large_for_a_core_share_the_work():
    model = settle(nn.Sequential(nn.Conv2d(3, 40, 3, 1, 1), Residual(40, 56, 2), nn.MaxPool2d(2), Residual(40, 24)))
    x = torch.randn(9, 3, 130, 150)
    assert error(gatedconv.Engine(model, x)(x), model, x) <= LIMIT


class Shrinking(nn.Module):
    """Every kind of segment, with a map that is read behind the next one.

    Maps too large for a core's cache, then weights larger than their maps, then large maps again.
    """

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 48, 3, 1, 1), nn.ReLU(), Residual(48, 24), nn.Conv2d(48, 32, 1))
        self.deep = nn.Sequential(nn.MaxPool2d(16), nn.Conv2d(32, 200, 3, 1, 1), Residual(200, 170))
        self.up = nn.Upsample(scale_factor=16)
        self.last = nn.Sequential(nn.Conv2d(232, 24, 1), nn.ReLU(), nn.Conv2d(24, 5, 3, 1, 1))

    def forward(self, x):
        wide = self.wide(x)
        return self.last(torch.cat([wide, self.up(self.deep(wide))], 1))


@pytest.fixture(scope="module")
def shrinking():
    torch.manual_seed(4)
    return gatedconv.Engine(settle(Shrinking()), torch.zeros(1, 3, 96, 96), verify=False)


@pytest.mark.parametrize("batch", [2, 3, 9])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_images_alone_and_together(shrinking, batch, threads):
    """As each image by itself, whose result the other tests compare with the model's."""
    x = torch.randn(batch, 3, 96, 96)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = shrinking(x)
    finally:
        torch.set_num_threads(before)
    assert_close(result, torch.cat([shrinking(image[None]) for image in x]))


def test_a_network_with_every_kind_of_segment(shrinking):
    x = torch.randn(1, 3, 96, 96)
    assert error(shrinking(x), shrinking.source, x) <= LIMIT


def test_another_size_than_the_example():
    model = settle(gatedconv.models.resnet20())
    engine = gatedconv.Engine(model, torch.randn(1, 3, 32, 32))
    for size in ((32, 32), (1, 1), (7, 45), (64, 33)):
        x = torch.randn(2, 3, *size)
        assert error(engine(x), model, x) <= LIMIT


def test_nan_and_infinity_go_where_pytorch_sends_them():
    model = settle(
        nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 4, 1), nn.ReLU6())
    )
    x = torch.randn(2, 3, 16, 16)
    x[0, 1, 3, 4] = float("nan")
    with torch.no_grad():
        expected = model(x)
    result = gatedconv.Engine(model, x)(x)
    assert torch.equal(result.isnan(), expected.isnan()) and bool(expected.isnan().any())
    assert_close(result, expected)


@pytest.mark.parametrize("kernel", ["winograd2", "winograd4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_winograd_spreads_no_nan_and_no_infinity(isa, kernel, bad, monkeypatch):
    monkeypatch.setattr("gatedconv.engine.engine.choose_estimated", lambda *_: kernel)
    net = settle(nn.Sequential(nn.Conv2d(6, 20, 3, 1, 1), nn.ReLU(), nn.Conv2d(20, 9, 3, 1, 1)))
    x = torch.randn(3, 6, 13, 11)
    x[1, 2, 5, 7] = x[1, 0, 12, 0] = bad
    engine = gatedconv.Engine(net, x)
    assert [step.op for step in engine.plans[0].steps].count(kernel) == 2
    result, expected = engine(x), net(x)
    assert 0 < int(expected.isfinite().logical_not().sum()) < expected.numel() // 3
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())
    assert_close(result, expected)


def test_a_sum_that_overflows_is_infinite_where_pytorchs_is(monkeypatch):
    monkeypatch.setattr("gatedconv.engine.engine.choose_estimated", lambda *_: "winograd4")
    net = nn.Conv2d(8, 8, 3, 1, 1).eval()
    x = torch.randn(1, 8, 16, 16)
    x[0, :, 6, 6] = 3e38
    result, expected = gatedconv.Engine(net, x)(x), net(x)
    assert torch.equal(result.isfinite(), expected.isfinite())
    far = expected.abs() < 1e30
    assert_close(result[far], expected[far])


class Axis(nn.Module):
    """Channels picked and put back along an axis that may be another than that of the channels."""

    def __init__(self, axis):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, 1, 1)
        self.pick = gatedconv.nn.GatherChannels(torch.tensor([0, 3, 4, 9, 11]), axis)
        self.put = gatedconv.nn.ScatterAdd(torch.tensor([1, 2, 5, 6, 10]), axis)

    def forward(self, x):
        y = self.conv(x)
        return self.put(y, self.pick(y))


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -3])
def test_gather_and_scatter_along_any_axis(isa, axis):
    net, x = Axis(axis).eval(), torch.randn(2, 12, 12, 12)
    engine = gatedconv.Engine(net, x)
    assert is_native(engine) == (axis in (1, -3))
    assert error(engine(x), net, x) <= LIMIT


@pytest.mark.parametrize("index", [[0], [5, 2, 2, 40, 39], list(range(0, 41, 2)), list(range(40, -1, -1))])
def test_gather_in_any_order(isa, index):
    net = nn.Sequential(nn.Conv2d(3, 41, 1), gatedconv.nn.GatherChannels(torch.tensor(index)), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 7)
    engine = gatedconv.Engine(net, x)
    assert is_native(engine)
    assert error(engine(x), net, x) <= LIMIT
