"""The CUDA engine's logic without a GPU: the same instructions, by PyTorch or by a stand-in for the kernel."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.engine import tuner as tuner_module
from gatedconv.engine.cuda import candidates, captured
from gatedconv.engine.cuda.time_on_gpu import planner_hash
from gatedconv.engine.describe import cuda_plan_lines
from gatedconv.ops import _masked_conv2d_cuda
from tests.cuda import plans
from tests.cuda.plans import always
from tests.engine.nets import Residual, error, settle
from tests.tolerances import tolerance

HEADER = {"device": "test", "torch": "1", "cudnn": 2, "sources": "abc"}


@pytest.fixture
def kernel(monkeypatch):
    """Let the plan believe that there is a kernel; counts its runs."""
    runs = []

    def run(*arguments):
        runs.append(arguments)
        return plans.conv_run(*arguments)

    monkeypatch.setattr(_masked_conv2d_cuda, "supports", lambda x, kernel, dilation, groups: groups == 1)
    monkeypatch.setattr(_masked_conv2d_cuda, "conv_pack", plans.conv_pack)
    monkeypatch.setattr(_masked_conv2d_cuda, "conv_run", run)
    return runs


def gated(position, share, shortcut="B"):
    torch.manual_seed(0)
    model = settle(gatedconv.models.resnet20(gate="channel", position=position, shortcut=shortcut))
    masks = {name: torch.rand(gate.num_gates) < share for name, gate in gatedconv.gates(model).items()}
    for mask in masks.values():
        mask[0] = share < 1
    return gatedconv.compact(gatedconv.freeze(model, masks=masks), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("position", ["after", "middle", "before"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_compact_resnet(position, shortcut, mode, kernel):
    model = gated(position, 0.45, shortcut)
    x = torch.randn(3, 3, 20, 28)
    plan = plans.make_plan(model, x, mode=mode, tuner=always("gatedconv 2x1") if mode == "on" else None)
    assert error(plan(x), model, x) <= tolerance()
    assert bool(kernel) == (mode == "on")
    # The gathers and scatters that compacting left are inside convolutions.
    assert not [one.op for one in plan.instructions if one.op in ("gather", "scatter_add")]
    assert any(one.out_index for one in plan.instructions) == (position == "after")
    assert any(one.in_index for one in plan.instructions) == (position == "before")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", pytest.param("resnext50_32x4d", marks=pytest.mark.slow)])
def test_torchvision(name, kernel):
    models = pytest.importorskip("torchvision").models
    model = settle(getattr(models, name)(num_classes=10))
    x = torch.randn(2, 3, 40, 64)
    plan = plans.make_plan(model, x, mode="auto", tuner=always("gatedconv 1x1"))
    assert error(plan(x), model, x) <= tolerance()
    assert kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_at_most_doubles_pytorchs_error(dtype, kernel):
    model = settle(nn.Sequential(nn.Conv2d(3, 11, 3, 2, 1), Residual(11, 37), Residual(11, 5, 2), nn.MaxPool2d(2)))
    x = torch.randn(2, 3, 24, 24).to(dtype)
    plan = plans.make_plan(model, x, dtype=dtype, mode="on", tuner=always("gatedconv 1x1"))
    low = model.to(dtype)
    with torch.no_grad():
        theirs = low(x)
    assert error(plan(x), low, x.float()) <= 2 * error(theirs, low, x.float())
    assert kernel


def test_a_scatter_into_a_stream_that_is_read_again_writes_elsewhere(kernel):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
            self.scatter, self.again = gatedconv.nn.ScatterAdd(torch.tensor([1, 4, 6])), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            stream = torch.relu(self.stem(x))
            return torch.relu(self.scatter(stream, self.part(stream))) + self.again(stream)

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 9, 9)
    plan = plans.make_plan(model, x, mode="on", tuner=always("gatedconv 1x1"))
    assert error(plan(x), model, x) <= tolerance()
    scatter = next(one for one in plan.instructions if one.out_index)
    assert not scatter.in_place and not any(run[9] for run in kernel)


def test_after_gates_leave_closed_channels_untouched(kernel):
    model, x = gated("after", 0.4), torch.randn(2, 3, 16, 16)
    plan = plans.make_plan(model, x, mode="on", tuner=always("gatedconv 1x2"))
    assert error(plan(x), model, x) <= tolerance()
    skipping = [run for run in kernel if run[9]]
    assert skipping and all(run[5].data_ptr() == run[6].data_ptr() for run in skipping)


def test_sizes_and_empty_batches():
    model = settle(gatedconv.models.resnet20())
    plan = plans.make_plan(model, torch.zeros(1, 3, 32, 32), mode="off")
    for size in ((32, 32), (1, 1), (7, 45)):
        x = torch.randn(2, 3, *size)
        assert error(plan(x), model, x) <= tolerance()
    assert plan(torch.zeros(0, 3, 32, 32)).shape == (0, 10)
    with pytest.raises(ValueError, match="too small"):
        plans.make_plan(nn.Sequential(nn.Conv2d(3, 4, 5)), torch.zeros(1, 3, 8, 8), mode="off")(torch.zeros(1, 3, 3, 3))


def tuner(tmp_path, times, header=None):
    names = iter(times)
    timer = lambda call: call() is not None and next(names)  # noqa: E731
    return tuner_module.Tuner(tmp_path / "tuned.json", header or HEADER, timer)


def offers(**results):
    return {name: (lambda r=result: lambda: r) for name, result in results.items()}


def test_the_fastest_right_way_is_taken_and_remembered(tmp_path):
    right = torch.ones(4)
    offered = offers(cudnn=right, wrong=right + 1, nan=right * float("nan"), ours=right + 1e-6, slow=right)

    def broken():
        raise RuntimeError("no tile fits")

    offered["broken"] = broken
    with pytest.warns(UserWarning, match="wrong differs from cudnn"):
        first = tuner(tmp_path, [3.0, 1.0, 2.0])
        assert first.choose("a", offered) == "ours"
    again = tuner(tmp_path, [])  # an exhausted timer: a measurement would raise
    assert again.choose("a", offered) == "ours"
    body = json.loads((tmp_path / "tuned.json").read_text())
    assert body["choices"]["a"]["ms"] == {"cudnn": 3.0, "ours": 1.0, "slow": 2.0}
    assert set(body["choices"]["a"]["out"]) == {"wrong", "nan", "broken"}
    # New candidates are measured, not ignored.
    assert tuner(tmp_path, [3.0, 4.0]).choose("a", offers(cudnn=right, other=right)) == "cudnn"


@pytest.mark.parametrize("written", [0, 100])
def test_memory_that_a_candidate_leaves_unwritten_is_noticed(written, tmp_path):
    """An allocator gives it the block of an earlier right result: what it does not write would be right by chance."""

    def right():
        return torch.arange(120.0)

    def lazy():
        result = torch.empty(120)
        result[:written] = torch.arange(120.0)[:written]
        return result

    offered = {"cudnn": lambda: right, "other": lambda: right, "lazy": lambda: lazy}
    with pytest.warns(UserWarning, match="lazy differs from cudnn"):
        assert tuner(tmp_path, [3.0, 2.0]).choose("a", offered) == "other"


def test_what_is_preferred_goes_before_what_is_faster(tmp_path):
    right = torch.ones(4)
    offered = {"cudnn": right, "gatedconv 1x1": right, "gatedconv 1x2": right}
    chosen = tuner(tmp_path, [1.0, 3.0, 2.0]).choose("a", offers(**offered), "gatedconv")
    assert chosen == "gatedconv 1x2"
    offered |= {"gatedconv 1x1": right + 1, "gatedconv 1x2": right + 1}
    with pytest.warns(UserWarning, match="differs from cudnn"):
        assert tuner(tmp_path, [1.0]).choose("b", offers(**offered), "gatedconv") == "cudnn"


@pytest.mark.parametrize("field", [*HEADER, "format"])
def test_choices_of_another_machine_or_version_do_not_hold(field, tmp_path, monkeypatch):
    offered = offers(cudnn=torch.ones(2), ours=torch.ones(2))
    assert tuner(tmp_path, [2.0, 1.0]).choose("a", offered) == "ours"
    header = dict(HEADER)
    if field == "format":
        monkeypatch.setattr(tuner_module, "FORMAT", 99)
    else:
        header[field] = "other"
    assert tuner(tmp_path, [1.0, 2.0], header).choose("a", offered) == "cudnn"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"choices": {"a": {"candidate": "ours"}}}', "null"]
)
def test_a_damaged_file_costs_a_measurement(content, tmp_path):
    (tmp_path / "tuned.json").write_text(content)
    offered = offers(cudnn=torch.ones(2), ours=torch.ones(2))
    assert tuner(tmp_path, [1.0, 2.0]).choose("a", offered) == "cudnn"
    assert tuner(tmp_path, []).choose("a", offered) == "cudnn"


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("")
    made = tuner_module.Tuner(tmp_path / "file" / "tuned.json", HEADER, lambda call: 1.0)
    with pytest.warns(UserWarning, match="choices are not kept"):
        made.choose("a", offers(cudnn=torch.ones(1), ours=torch.ones(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.choose("b", offers(cudnn=torch.ones(1), ours=torch.ones(1)))


def test_two_processes_keep_each_others_choices(tmp_path):
    offered = offers(cudnn=torch.ones(2), ours=torch.ones(2))
    first, second = tuner(tmp_path, [1.0, 2.0]), tuner(tmp_path, [2.0, 1.0])
    first.choose("a", offered)
    second.choose("b", offered)
    assert set(json.loads((tmp_path / "tuned.json").read_text())["choices"]) == {"a", "b"}


def test_what_breaks_the_device_is_raised_and_not_kept(tmp_path, monkeypatch):
    """After such an error every candidate fails, the right ones too."""

    def broken():
        raise RuntimeError("launch failed")

    def wait():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tuner_module, "wait_for_device", wait)
    offered = offers(cudnn=torch.ones(2)) | {"guilty": broken} | offers(later=torch.ones(2))
    made = tuner(tmp_path, [1.0, 2.0])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        made.choose("a", offered)
    assert not (tmp_path / "tuned.json").exists() and not made.choices


def test_where_no_way_can_be_timed_the_first_error_is_raised(tmp_path):
    def timer(call):
        raise RuntimeError(f"no events for {call()[0]:g}")

    made = tuner_module.Tuner(tmp_path / "tuned.json", HEADER, timer)
    with pytest.raises(RuntimeError, match="no events for 5"):
        made.choose("a", offers(cudnn=torch.full((2,), 5.0), ours=torch.full((2,), 5.001)))
    assert not (tmp_path / "tuned.json").exists()


def test_a_map_that_is_not_finite_excludes_no_candidate_for_good(tmp_path):
    inf, nan = float("inf"), float("nan")
    offered = offers(cudnn=torch.tensor([1.0, inf]), same=torch.tensor([1.0, nan]), wrong=torch.tensor([2.0, inf]))
    made = tuner(tmp_path, [2.0, 1.0, 3.0, 4.0, 5.0])
    with pytest.warns(UserWarning, match="wrong differs from cudnn"):
        assert made.choose("a", offered) == "same"
    assert made.choose("b", offers(cudnn=torch.full((2,), nan), ours=torch.ones(2))) == "cudnn"
    assert not (tmp_path / "tuned.json").exists()
    right = torch.ones(2)
    assert made.choose("a", offers(cudnn=right, same=right, wrong=right)) == "cudnn"  # measured anew: 3, 4 and 5 ms
    assert not tuner_module.agrees(torch.tensor([1.0, 2.0]), torch.tensor([1.0, inf]))


def test_choices_depend_on_the_python_that_packs(tmp_path):
    for name, text in (("candidates.py", "a = 1"), ("resident.py", "b = 1"), ("other.md", "c = 1")):
        (tmp_path / name).write_text(text)
    before = planner_hash(tmp_path)
    (tmp_path / "other.md").write_text("c = 2")
    assert planner_hash(tmp_path) == before
    (tmp_path / "resident.py").write_text("b = 2")
    assert planner_hash(tmp_path) != before


def test_a_capture_of_a_size_that_was_never_tuned_raises(monkeypatch):
    plan = plans.make_plan(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8), mode="off")
    plan.tune(torch.zeros(1, 3, 8, 8))
    plan.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plan(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    with pytest.raises(RuntimeError, match=r"shape \(2, 3, 8, 8\) while a CUDA graph is captured"):
        plan(torch.zeros(2, 3, 8, 8))


def test_a_plan_tunes_once_for_each_shape(tmp_path, kernel):
    keys = []

    class Asked(always):
        def choose(self, key, candidates, prefer=""):
            keys.append(key)
            return super().choose(key, candidates)

    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    plan = plans.make_plan(model, torch.zeros(1, 3, 16, 16), mode="auto", tuner=Asked("gatedconv 1x1"))
    for batch in (1, 2, 1, 2):
        x = torch.randn(batch, 3, 16, 16)
        assert error(plan(x), model, x) <= tolerance()
    assert len(keys) == 6 and len(set(keys)) == 6
    assert "[gatedconv 1x1]" in "".join(cuda_plan_lines(plan, 1))
    assert "not measured yet" in "".join(cuda_plan_lines(plan, 7))


class FakeGraph:
    """As `captured.CapturedGraph`, without a GPU."""

    def __init__(self, function, x):
        self.function, self.held, self.done = function, x.detach().clone(), self

    def synchronize(self):
        pass

    def __call__(self, x):
        self.held.copy_(x)
        return self.function(self.held)


def test_graphs_are_bounded_and_given_up_after_their_last_call(monkeypatch):
    shapes, waits = [], []

    class Graph(FakeGraph):
        def __init__(self, function, x):
            super().__init__(function, x)
            shapes.append(tuple(x.shape))

        def synchronize(self):
            waits.append(tuple(self.held.shape))

    monkeypatch.setattr(captured, "CapturedGraph", Graph)
    monkeypatch.setattr(captured, "LIMIT", 2)
    cache = captured.GraphCache(lambda x: x + 1)
    for batch in (1, 2, 1, 3, 1, 2):
        assert torch.equal(cache(torch.zeros(batch)), torch.ones(batch))
    assert shapes == [(1,), (2,), (3,), (2,)] and waits == [(2,), (3,)]


def test_what_was_captured_in_inference_mode_serves_outside_of_it(monkeypatch):
    monkeypatch.setattr(captured, "CapturedGraph", FakeGraph)
    cache = captured.GraphCache(lambda x: x + 1)
    with torch.inference_mode():
        assert torch.equal(cache(torch.zeros(3)), torch.ones(3))
    result = cache(torch.ones(3, requires_grad=True))
    assert torch.equal(result, torch.full((3,), 2.0)) and not result.requires_grad


def test_threads_take_turns_at_a_graph(monkeypatch):
    inside, overlaps = [], []

    def twice(x):
        inside.append(1)
        overlaps.append(len(inside))
        result = x * 2
        inside.pop()
        return result

    monkeypatch.setattr(captured, "CapturedGraph", FakeGraph)
    cache = captured.GraphCache(twice)
    x = torch.arange(1000.0)
    results = []
    threads = [threading.Thread(target=lambda: results.append(cache(x))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16 and all(torch.equal(result, 2 * x) for result in results)
    assert set(overlaps) == {1}


def test_the_switch(monkeypatch):
    monkeypatch.delenv("GATEDCONV_CUDA_KERNELS", raising=False)
    assert _masked_conv2d_cuda.kernels_mode() == "off"
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", "always")
    with pytest.raises(ValueError, match="expected off, on, auto or experimental, got 'always'"):
        _masked_conv2d_cuda.kernels_mode()


def test_without_the_switch_no_kernel_of_ours_is_among_the_ways(kernel):
    plan = plans.make_plan(gated("middle", 0.5), torch.zeros(1, 3, 8, 8), mode="off")
    for one in plan.instructions:
        if one.op == "conv":
            assert set(candidates.conv_candidates(one, torch.float16, torch.device("cpu"), "off")) == {"cudnn"}


def test_pytorchs_own_setting_decides_about_tf32():
    conv, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    try:
        for precision, allowed in (("tf32", True), ("ieee", False)):
            conv.fp32_precision = precision
            assert _masked_conv2d_cuda.allows_tf32() is allowed
    finally:
        conv.fp32_precision = before
