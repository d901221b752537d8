"""The resident driver on a GPU: parity, repeats bit for bit, graphs, streams, and the choice of the faster."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.engine.cuda import resident
from gatedconv.engine.cuda.resident_runs import UNIT
from gatedconv.ops import _masked_conv2d_cuda
from tests.cuda import plans
from tests.cuda.gpu.test_gpu import gated, kind_of
from tests.cuda.plans import always
from tests.engine.nets import Residual, settle
from tests.tolerances import assert_close, floor, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}
RANKS = (1, 2, 4, 8)


@pytest.fixture(params=FORMATS)
def dtype(request, monkeypatch):
    if request.param != "float16" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip(f"{request.param} needs compute capability 8.0")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32" if request.param == "tf32" else "ieee")
    return FORMATS[request.param]


def resident_plan(model, x, ranks):
    """The plan of a model, rounded to the dtype of x, with every run of layers as one launch; nothing has run yet."""
    limits = resident.limits(x.device, x.dtype)
    assert limits is not None
    if limits.shared_bytes < 99 * 1024:
        pytest.skip("the maps do not fit into this GPU's shared memory")
    if ranks not in limits.ranks:
        pytest.skip("clusters of blocks need compute capability 9.0")
    low = copy.deepcopy(model).to(x.dtype)
    return plans.make_plan(
        low, x.cpu().float(), dtype=x.dtype, device="cuda", mode="experimental", tuner=always(f"resident x{ranks}")
    )


def launches(plan, x):
    """What one launch computes of inputs like x: [(run, candidate)]."""
    plan.tune(x)
    found = [(run, plan._resident(run, name)) for run, name in plan.runs[tuple(x.shape)].values()]
    assert found
    return found


def odd():
    torch.manual_seed(0)
    blocks = Residual(11, 37), Residual(11, 96, 2), Residual(11, 5)
    return settle(nn.Sequential(nn.Conv2d(3, 11, 5, 2, 1), *blocks))


NETWORKS = {
    "resnet20 after": partial(gated, "resnet20", "after"),
    "resnet20 middle": partial(gated, "resnet20", "middle"),
    "resnet20 before": partial(gated, "resnet20", "before"),
    "odd": odd,
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_parity(name, ranks, dtype):
    model = NETWORKS[name]()
    torch.manual_seed(0)
    x = torch.randn(65, 3, 32, 32, device="cuda").to(dtype)
    low = copy.deepcopy(model).cuda().to(dtype)
    plan = resident_plan(model, x, ranks)
    assert launches(plan, x)
    with torch.no_grad():
        exact, theirs = copy.deepcopy(low).double()(x.double()), low(x)
        for batch in (5, 1, 65):
            mine = torch.cat([plan(part) for part in x.split(batch)])
            least = floor(kind_of(dtype), "network") * float(exact.square().mean().sqrt())
            assert plans.rms(mine, exact) <= max(2 * plans.rms(theirs, exact), least), batch


@pytest.mark.parametrize("ranks", RANKS)
def test_a_thousand_repeats_are_equal_bit_for_bit(ranks):
    """A barrier that is missing shows as a difference, if seldom."""
    x = torch.randn(64, 3, 32, 32, device="cuda").half()
    plan = resident_plan(gated(), x, ranks)
    first = plan(x)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        wrong += (plan(x) != first).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("ranks", (1, 4))
def test_two_streams(ranks):
    inputs = [torch.randn(4, 3, 32, 32, device="cuda").half() for _ in range(2)]
    plan = resident_plan(gated(), inputs[0], ranks)
    expected = [plan(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(100):
        results = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(plan(x))
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def test_a_graph_of_the_users_own():
    x = torch.randn(4, 3, 32, 32, device="cuda").half()
    plan = resident_plan(gated(), x, 1)
    expected = plan(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan(x)
    graph.replay()
    assert torch.equal(out, expected)


def test_the_engine_measures_both_and_takes_one(monkeypatch, tmp_path):
    monkeypatch.setenv("GATEDCONV_CACHE", str(tmp_path))
    x = torch.randn(1, 3, 32, 32, device="cuda").half()
    for mode, launches in (("experimental", None), ("on", False), ("auto", False), ("off", False)):
        monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", mode)
        engine = gatedconv.Engine(gated().cuda().half(), x)
        engine(x)
        found = "one launch" in engine.describe()
        assert launches is None or found == launches, mode


@pytest.mark.parametrize("change", [{0: 16}, {0: 0}, {1: 3}, {5: 1 << 30}, {6: 7}, {7: 31}, {9: 99}], ids=str)
def test_a_layout_that_does_not_fit_is_refused(change):
    x = torch.randn(1, 3, 32, 32, device="cuda").half()
    (run, candidate), *_ = launches(resident_plan(gated(), x, 1), x)
    layout = [change.get(at, number) for at, number in enumerate(candidate.layout)]
    source = run.maps[run.source]
    size = (1, source.units * UNIT // x.itemsize, source.height, source.width)
    given = torch.zeros(size, dtype=x.dtype, device="cuda").to(memory_format=torch.channels_last)
    out = torch.empty(1, *candidate.size, dtype=x.dtype, device="cuda", memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="resident_run"):
        resident.resident_run(given, candidate.stream, out, layout, False)
    with pytest.raises(RuntimeError, match="whole pieces"):
        resident.resident_run(given, candidate.stream[:-1], out, candidate.layout, False)


def test_kept_weights_follow_the_layers(monkeypatch):
    """A frozen layer packs once, and again when its weights, its mask or the stream is another."""
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", "on")
    assert _masked_conv2d_cuda.kernels_mode() == "on"
    torch.manual_seed(0)
    conv = gatedconv.Conv2d(16, 16, 3, padding=1).cuda().half()
    mask = torch.rand(16, device="cuda") < 0.5
    x = torch.randn(2, 16, 9, 9, device="cuda").half()

    def right():
        expected = torch.nn.functional.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=1)
        assert_close(conv.masked_forward(x, mask), expected * mask[:, None, None])

    with torch.no_grad():
        right()
        kept = conv._packed._kept
        right()
        assert kept is not None and conv._packed._kept is kept
        conv.weight.mul_(-2)
        right()
        mask.copy_(~mask)
        right()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            right()


@pytest.mark.parametrize("per_sample_outputs", [False, True])
def test_inputs_that_a_sample_closes_are_not_read(per_sample_outputs, dtype, monkeypatch):
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", "on")
    torch.manual_seed(0)
    x = torch.randn(4, 40, 9, 7, device="cuda").to(dtype)
    weight = torch.randn(24, 40, 3, 3, device="cuda").to(dtype) / 19
    in_open = torch.rand(4, 40, device="cuda") < 0.4
    in_open[0] = False
    out_open = torch.rand((4, 24) if per_sample_outputs else (24,), device="cuda") < 0.5
    x = x.masked_fill(~in_open[:, :, None, None], float("nan"))
    arguments = (weight, None, out_open, in_open)
    exact = gatedconv.ops.masked_conv2d_reference(x.double(), weight.double(), *arguments[1:], padding=1)
    theirs = gatedconv.ops.masked_conv2d_reference(x, *arguments, padding=1)
    with torch.no_grad():
        mine = gatedconv.ops.masked_conv2d(x, *arguments, padding=1)
    error, plain = (float((t.double() - exact).abs().max()) for t in (mine, theirs))
    least = floor("tf32") * float(exact.abs().max()) if kind_of(dtype) == "tf32" else tolerance()
    assert error <= max(2 * plain, least)
