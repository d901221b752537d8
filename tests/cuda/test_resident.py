"""The resident driver without a GPU: which layers it takes, where maps lie, and its own body, lane by lane, on the CPU.

The body runs under AddressSanitizer and UBSan, and once more under ThreadSanitizer, every warp a thread.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gatedconv
from gatedconv.engine.cuda import resident, resident_runs
from gatedconv.engine.cuda.instructions import map_sizes
from gatedconv.engine.describe import cuda_plan_lines
from tests.cuda import plans
from tests.cuda.gpu import test_resident as gpu_tests
from tests.cuda.gpu.test_sanitized import sanitized_network
from tests.cuda.plans import always
from tests.cuda.test_cuda_plan import gated
from tests.engine.nets import Residual, error, settle
from tests.native import resident_twin
from tests.native.test_sanitizers import SANITIZE
from tests.tolerances import assert_close, tolerance

# Allowed even where PyTorch's own error is small by luck. Here float32 multiplies in tf32, which has no peer on a CPU.
FLOOR = {dtype: tolerance(dtype) for dtype in (torch.float16, torch.bfloat16)}
FLOOR[torch.float32] = tolerance("tf32", "network")
H100, T4 = 232448, 65536


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    program = resident_twin.Twin(tmp_path_factory.mktemp("resident"), SANITIZE)
    yield program
    program.close()


@pytest.fixture(scope="module")
def racing_twin(tmp_path_factory):
    program = resident_twin.Twin(tmp_path_factory.mktemp("racing"), resident_twin.RACES)
    yield program
    program.close()


def served(monkeypatch, twin, budget=H100, ranks=(1, 2, 4, 8)):
    """Let plans on the CPU believe in a GPU, whose launches the twin runs."""
    twin.layouts.clear()
    monkeypatch.setattr(resident, "limits", lambda device, dtype: resident.Limits(budget, ranks))
    monkeypatch.setattr(resident, "resident_run", twin.run)


def compare(model, x, dtype, ranks, tuner=None):
    """The plan's error against float64, at most twice PyTorch's in that type."""
    low, given_ = copy.deepcopy(model).to(dtype), x.to(dtype)
    plan = plans.make_plan(model, given_, dtype=dtype, mode="experimental", tuner=tuner or always(f"resident x{ranks}"))
    mine = plan(given_)
    with torch.no_grad():
        theirs = low(given_)
    assert mine.dtype == dtype and mine.shape == theirs.shape
    assert error(mine, low, given_) <= max(2 * error(theirs, low, given_), FLOOR[dtype])
    return plan


RESNETS = (("after", "B", 0.45), ("middle", "B", 0.5), ("before", "A", 0.45), ("after", "A", 0.0), ("middle", "A", 1.0))
LAUNCHES = ((torch.float16, 1), (torch.bfloat16, 4), (torch.float32, 2))
# Each network once, each launch at least once; all pairs are slow.
PAIRS = [
    pytest.param(*network, *launch, marks=[] if j == i % len(LAUNCHES) else pytest.mark.slow)
    for i, network in enumerate(RESNETS)
    for j, launch in enumerate(LAUNCHES)
]


@pytest.mark.parametrize("position,shortcut,share,dtype,ranks", PAIRS)
def test_a_compact_resnet_is_one_launch(position, shortcut, share, dtype, ranks, twin, monkeypatch):
    served(monkeypatch, twin)
    plan = compare(gated(position, share, shortcut), torch.randn(2, 3, 12, 20), dtype, ranks)
    assert len(twin.layouts) >= 1 and {layout[0] for layout in twin.layouts} == {ranks}
    ((run, _),) = next(iter(plan.runs.values())).values()
    assert (run.start, run.end) == (0, len(plan.instructions))
    lines = cuda_plan_lines(plan, 2)
    assert all(f"[resident x{ranks}, one launch]" in line for line in lines) and len(lines) == len(plan.instructions)


class Random(nn.Module):
    """Blocks, gathers, scatters, shortcuts of both kinds, sums and a head, drawn from a seed."""

    def __init__(self, draw):
        super().__init__()
        pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
        channels = pick(1, 5, 8, 11, 16, 24)
        kernel = pick(1, 3, 5)
        layers: list[nn.Module] = [nn.Conv2d(3, channels, kernel, pick(1, 2), draw(st.integers(0, 2)), bias=pick(0, 1))]
        for _ in range(draw(st.integers(1, 3))):
            kind = pick("residual", "scatter", "gather", "pad", "plain")
            if kind == "residual":
                layers.append(Residual(channels, pick(1, 4, 9, 72), pick(1, 2)))
            elif kind == "scatter":
                count = draw(st.integers(1, channels))
                layers.append(Scattering(channels, count, pick(True, False), pick(True, False)))
            elif kind == "gather":
                index = torch.randperm(channels)[: draw(st.integers(1, channels))]
                layers += [gatedconv.nn.GatherChannels(index), nn.Conv2d(len(index), channels, 3, padding=1)]
            elif kind == "pad":
                more = draw(st.integers(0, 7))
                layers.append(gatedconv.nn.PadShortcut(channels, channels + more, pick(1, 2)))
                channels += more
            else:
                dilation = pick(1, 2)
                width = pick(3, 16, 70)
                layers += [nn.Conv2d(channels, width, (3, 1), 1, (dilation, 0), (dilation, 1)), nn.ReLU6()]
                channels = width
        layers.append(nn.Conv2d(channels, 7, 1))
        self.body = nn.Sequential(*layers)
        self.pooled = pick(True, False)

    def forward(self, x):
        x = self.body(x)
        return x.mean((2, 3)) if self.pooled else x


class Scattering(nn.Module):
    """relu(stream + scatter(conv(stream))), the stream after a ReLU or not, read once more or not."""

    def __init__(self, channels, count, relu, again):
        super().__init__()
        self.part = nn.Conv2d(channels, count, 3, padding=1)
        self.scatter = gatedconv.nn.ScatterAdd(torch.randperm(channels)[:count].sort().values)
        self.relu, self.again = relu, again

    def forward(self, x):
        x = torch.relu(x) if self.relu else x
        out = torch.relu(self.scatter(x, self.part(x)))
        return out + x if self.again else out


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 2**30)))
    model = settle(Random(draw))
    size = draw(st.tuples(st.integers(9, 20), st.integers(9, 20)))
    x = torch.randn(draw(st.integers(1, 2)), 3, *size)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    return model, x, dtype, draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([H100, 40000]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=networks())
def test_any_network(case, twin, monkeypatch):
    model, x, dtype, ranks, budget = case
    served(monkeypatch, twin, budget)
    compare(model, x, dtype, ranks)


@pytest.mark.parametrize("ranks", [1, 4])
def test_no_two_warps_touch_a_byte_without_a_barrier(ranks, racing_twin, monkeypatch):
    served(monkeypatch, racing_twin)
    compare(gated("after", 0.5, "A"), torch.randn(1, 3, 12, 12), torch.float16, ranks)
    wide = settle(nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8, 96, 2)))
    compare(wide, torch.randn(1, 3, 10, 10), torch.float16, ranks)
    assert racing_twin.layouts


def whole(model, size, dtype=torch.float16):
    plan = plans.make_plan(model, torch.zeros(1, 3, *size), dtype=dtype, mode="off")
    sizes = map_sizes(plan.instructions, plan.first, size)
    return plan, lambda budget: resident_runs.find_runs(plan.instructions, sizes, plan.last, dtype, budget)


def mid_50(model):
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(model).items()}
    return gatedconv.compact(gatedconv.freeze(model, masks=masks), torch.zeros(1, 3, 32, 32))


def test_resnet56_fits_the_gpus_that_it_should():
    """As a whole where a block has 99 KiB and more; on a T4 the later stages, and of a compact one the first."""
    half = mid_50(gatedconv.models.resnet56(gate="channel", position="middle"))
    for model, runs_on_t4 in ((half, [(0, 19), (22, 59)]), (gatedconv.models.resnet56(), [(22, 59)])):
        plan, runs = whole(model, (32, 32))
        for budget in (101376, H100):
            (run,) = runs(budget)
            assert (run.start, run.end) == (0, len(plan.instructions))
            assert run.shared_bytes(run.ring(budget, 1)) <= budget
        assert run.ring(H100, 1) >= 4 and run.shared_bytes(4) <= H100 // 2 - 1024, "two images a multiprocessor"
        on_t4 = runs(T4)
        assert [(run.start, run.end) for run in on_t4] == runs_on_t4 and len(plan.instructions) == 59
        assert all(run.shared_bytes(2) <= T4 for run in on_t4)
    assert not whole(gatedconv.models.resnet20(), (224, 224))[1](T4)


def test_a_convolution_without_inputs_ends_a_run():
    plan, runs = whole(nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8, 8), Residual(8, 8)), (12, 12))
    (run,) = runs(H100)
    assert (run.start, run.end) == (0, len(plan.instructions))
    plan.instructions[2].in_index = []
    for run in runs(H100):
        assert not run.start <= 2 < run.end


def test_the_gpu_tests_find_runs_in_99_kib():
    for make in gpu_tests.NETWORKS.values():
        model = make()
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert whole(model, (32, 32), dtype)[1](99 * 1024)
    for dtype in (torch.float16, torch.float32):
        (run,) = whole(sanitized_network(), (12, 12), dtype)[1](99 * 1024)
        assert {"load", "conv", "move", "mean", "save"} == {step.op for step in run.steps}


def test_places_never_overlap_while_they_are_needed():
    model = mid_50(gatedconv.models.resnet20(gate="channel", position="after"))
    _, runs = whole(model, (32, 32))
    (run,) = runs(H100)
    last = {n: at for at, step in enumerate(run.steps) for n in (step.source, step.target, step.residual)}
    live: dict[int, int] = {}
    for at, step in enumerate(run.steps):
        if step.target in run.maps:
            live[step.target] = run.maps[step.target].at
        spans = {
            (run.maps[n].at, run.maps[n].at + run.maps[n].units * run.maps[n].plane) for n in live if last[n] >= at
        }
        for one in spans:
            assert sum(one[0] < other[1] and other[0] < one[1] for other in spans) == 1
        assert max(end for _, end in spans) <= run.map_bytes


@pytest.mark.parametrize("fragments", [1, 2, 3, 4, 7, 16, 49, 64, 200])
@pytest.mark.parametrize("blocks", range(1, 9))
def test_tiles_cover_everything(fragments, blocks):
    tile = resident.choose_tile(fragments, blocks)
    assert (tile.mt, tile.nt) in resident.TILES and tile.groups <= 8
    assert tile.groups * tile.nt >= blocks and tile.groups * tile.nt <= 8
    assert tile.passes * tile.fragments >= fragments > (tile.passes - 1) * tile.fragments


class Times:
    """A tuner with given times of the candidates."""

    def __init__(self, **ms):
        self.ms, self.calls = ms, []

    def choose(self, key, candidates, prefer=""):
        if "layers" not in candidates:
            return next(iter(candidates))
        self.calls.append((key, {name: build()() for name, build in candidates.items()}))
        return min(candidates, key=lambda name: self.ms.get(name.replace(" ", "_"), 9.0))


def test_the_faster_of_launch_and_layers_is_taken(twin, monkeypatch):
    served(monkeypatch, twin)
    model, x = gated("after", 0.5), torch.randn(2, 3, 9, 12)
    slow = compare(model, x, torch.float16, 1, Times(layers=1.0, resident_x2=2.0))
    assert not any(slow.runs.values()) and "one launch" not in "".join(cuda_plan_lines(slow, 2))
    tuner = Times(layers=1.0, resident_x2=0.5)
    fast = compare(model, x, torch.float16, 1, tuner)
    ((_, name),) = next(iter(fast.runs.values())).values()
    assert name == "resident x2"
    ((_, results),) = tuner.calls
    assert set(results) == {"layers", "resident x1", "resident x2", "resident x4", "resident x8"}
    for result in results.values():
        assert_close(result, results["layers"], algorithm="network")


@pytest.mark.parametrize("mode", ["off", "on", "auto"])
def test_it_is_left_out_where_it_is_not_wanted(mode, twin, monkeypatch):
    served(monkeypatch, twin)
    model, x = gated("middle", 0.5), torch.randn(1, 3, 9, 9)
    plan = plans.make_plan(model, x, mode=mode, tuner=always("resident x1"))
    assert error(plan(x), model, x) <= tolerance() and not twin.layouts


def test_sizes_and_batches_have_launches_of_their_own(twin, monkeypatch):
    served(monkeypatch, twin)
    model = gated("middle", 0.5)
    x = torch.zeros(1, 3, 8, 8)
    plan = plans.make_plan(model, x, dtype=torch.float16, mode="experimental", tuner=always("resident x1"))
    low = copy.deepcopy(model).half()
    for shape in ((1, 3, 8, 8), (3, 3, 8, 8), (1, 3, 5, 13), (1, 3, 8, 8)):
        x = torch.randn(shape).half()
        assert error(plan(x), low, x) <= tolerance(torch.float16)
    assert len(plan._launches) == 2 and len(plan.runs) == 3
