"""`python -m benchmarks.gpu` without a GPU: the dry walk, time limits, rows on the disk, peers, parity's judgment."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, engine_timings, gate_timings, parity, training_timings
from benchmarks.gpu.cases import Case, all_cases
from benchmarks.gpu.section import headline, section
from benchmarks.harness import Machine, count_kernels, poisoned, precision, variable
from gatedconv.bench.comparison import Row
from tests.tolerances import SAFETY, UNIT_ROUNDOFF, assert_close, tolerance

DRY = Machine(dry=True)


def script(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def case(name: str = "a", seconds: float = 30.0) -> Case:
    return Case(name, (lambda machine: [Row("gate", name, 1, "float32", "eager")],), seconds)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_cases_have_names_of_their_own_and_first_comes_first() -> None:
    found = all_cases()
    names = [each.name for each in found]
    assert len(set(names)) == len(names)
    first = [each.first for each in found]
    assert first == sorted(first, reverse=True)
    limits = {each.name: each.seconds for each in found if each.first}
    assert all(seconds <= 90 for name, seconds in limits.items() if name != "build" and "sanitizer" not in name)
    kinds = [name.split("-")[0] for name in limits]
    order = ["build", "ceilings", "parity", "gate", "gated_scale", "engine", "layer", "step", "sanitizer"]
    assert list(dict.fromkeys(kinds)) == order
    assert {f"parity-resident-x{ranks}" for ranks in (1, 2, 4, 8)} <= limits.keys()
    assert {f"engine-{batch}" for batch in (32, 256, 1)} <= limits.keys()
    slow = max(names.index(name) for name in limits if "compile" not in name and "sanitizer" not in name)
    assert all(names.index(name) > slow for name in limits if "compile" in name)


def test_a_dry_walk_runs_the_smallest_case_of_each_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "STAND_IN", "no.such.module")  # the references run
    chosen = [each for each in all_cases() if each.dry and not each.name.startswith(("engine", "gate-layer-comp"))]
    assert command.dry_walk(chosen) == 0
    text = capsys.readouterr().out
    for word in ("ceiling", "tiled convolution 1x1", "resident x1", "gate, 2 repeats", "block end", "layer 16x4x4"):
        assert word in text, word
    scaled = [line.split() for line in text.splitlines() if line.startswith("gated_scale ")]
    assert {"eager", "gatedconv", "reduce-overhead"} <= {word for line in scaled for word in line}
    assert "0 failed" in text and "training step" in text and "not run: " in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_walk_executes_the_compiled_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    stand_in = pytest.importorskip(cases.STAND_IN)
    if not stand_in.has_nvcc():
        pytest.skip("no nvcc")
    assert command.dry_walk([each for each in all_cases() if each.dry]) == 0
    text = capsys.readouterr().out
    assert "0 failed" in text and "layer      16->8 of 16 3x3 @8" in text
    engines = [line.split() for line in text.splitlines() if line.startswith("engine ")]
    assert {"gatedconv", "resident", "reduce-overhead"} <= {word for line in engines for word in line}


def test_without_a_gpu_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["first"]) == 2
    assert capsys.readouterr().err == "gpu: no CUDA device is visible (--dry does without)\n"
    assert command.main(["second"]) == 2


@pytest.mark.parametrize("arguments", [["first"], ["--dry"]], ids=str)
def test_in_a_bare_checkout_it_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There kernels/ is no part of the package."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == "gpu: gatedconv is not installed: pip install -e .\n"


def test_a_case_is_killed_at_its_limit_with_its_processes(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    child = f"import os, subprocess, time; p = subprocess.Popen({script('import time; time.sleep(60)')!r}); "
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); print('started', flush=True); time.sleep(60)"
    (row,) = command.run_case(case(), script(child), tmp_path, 1.5)
    assert row.failed and row.note == "failed: killed after 2 s" and row.case == "a"
    for _ in range(50):
        if not _running(int((tmp_path / "pid").read_text())):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child of a killed case still runs")


def _running(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_process_that_dies_is_a_row_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (row,) = command.run_case(case(), script("print('illegal address'); raise SystemExit(7)"), tmp_path, 30)
    assert row.note == "failed: exit code 7: illegal address"
    assert (tmp_path / "logs" / "a.log").read_text() == "illegal address\n"


def test_the_next_case_runs_whatever_happened_and_every_row_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[int] = []

    def run_case(each: Case, command_: object, out: Path, seconds: float) -> list[Row]:
        kept.append(len(json.loads((out / "gpu.json").read_text())["rows"]) if (out / "gpu.json").exists() else 0)
        note = "failed: killed after 40 s" if each.name == "a" else None
        return [Row("gate", each.name, 1, "float32", "eager", ms_median=1.0, ms_min=1.0, note=note)]

    monkeypatch.setattr(command, "run_case", run_case)
    late = time.monotonic() + 1000
    assert command.run_all([case("a"), case("b")], tmp_path, late) == 1
    assert kept == [0, 1]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["a", "b"] and found["machine"]["device"]
    assert "2 rows, 1 failed" in capsys.readouterr().out
    assert command.run_all([case("c")], tmp_path, time.monotonic()) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["note"] == "not run: out of time"


def test_an_interrupt_ends_what_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = command.run_case, threading.Event()

    def run_case(each: Case, command_: object, out: Path, seconds: float) -> list[Row]:
        if each.name == "quick":
            started.wait(30)
            return []
        started.set()
        return real(each, script("import time; time.sleep(600)"), out, 500)

    def interrupted(rows: object) -> str:
        while not command.RUNNING:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_case", run_case)
    monkeypatch.setattr(command, "table", interrupted)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with pytest.raises(KeyboardInterrupt):
        command.run_all([replace(case(name), alone=False) for name in ("quick", "slow")], tmp_path, None)
    assert not command.RUNNING


def test_the_file_to_send_names_no_folder_of_the_user(tmp_path: Path) -> None:
    note = f"failed: {Path.home()}/.cache/gatedconv/x.so and {command.ROOT}/csrc/a.cu"
    command.save(tmp_path, [Row("case", "a", 0, "", "", note=note)])
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["note"] == "failed: ~/.cache/gatedconv/x.so and gatedconv/csrc/a.cu"


def test_the_next_part_runs_after_one_that_fails(tmp_path: Path) -> None:
    def broken(machine: Machine) -> list[Row]:
        raise ValueError("no such tile")

    two = Case("two", (broken, case().parts[0]))
    assert [row.note for part in command.attempts(two, DRY) for row in part] == [
        "failed: ValueError: no such tile",
        None,
    ]


def test_rows_before_a_crash_are_kept(tmp_path: Path) -> None:
    assert command.child(case("b"), tmp_path) == 0
    (tmp_path / "logs").mkdir()
    os.replace(tmp_path / ".b.json", tmp_path / "kept")
    moved = f"import os; os.replace({str(tmp_path / 'kept')!r}, {str(tmp_path / '.b.json')!r}); os._exit(3)"
    rows = command.run_case(case("b"), script(moved), tmp_path, 30)
    assert [row.note for row in rows] == [None, "failed: exit code 3: no output"]


def test_rows_of_a_child_come_back(tmp_path: Path) -> None:
    assert command.child(case("b"), tmp_path) == 0
    (tmp_path / "logs").mkdir()
    moved = f"import os; os.replace({str(tmp_path / 'kept')!r}, {str(tmp_path / '.b.json')!r})"
    os.replace(tmp_path / ".b.json", tmp_path / "kept")
    assert command.run_case(case("b"), script(moved), tmp_path, 30) == [Row("gate", "b", 1, "float32", "eager")]


def test_the_table_has_speeds_relative_to_the_baseline() -> None:
    rows = [
        Row("gate", "g", 1, "float32", provider, ms_median=ms, ms_min=ms, error=1e-3)
        for provider, ms in (("eager", 2.0), ("gatedconv", 0.5))
    ]
    lines = [line.split() for line in command.table(rows).splitlines()[2:]]
    assert [line[7] for line in lines] == ["1.00", "4.00"] and lines[0][8] == "1.0e-03"


def test_the_readme_has_the_range_over_dense_cudnn(tmp_path: Path) -> None:
    times = {"a": (1.0, 2.0), "b": (1.0, 8.0)}
    rows = [
        Row("layer", case, 1, "float16", provider, ms_min=ms)
        for case, pair in times.items()
        for provider, ms in zip(("dense cudnn", "gatedconv"), pair, strict=True)
    ]
    assert headline(tmp_path) == ""
    found = {"machine": {"device": "h200"}, "rows": [row.as_dict() for row in rows]}
    (tmp_path / "gpu-h200.json").write_text(json.dumps(found))
    assert "(H200), our own convolution takes 2.0 to 8.0 times as long" in headline(tmp_path)
    assert "on 2 single layers in float16" in headline(tmp_path)


def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_timings, "build", lambda machine, provider, network, x: lambda x: network(x) + 1)
    with pytest.raises(RuntimeError, match="twice PyTorch's own is"):
        engine_timings.network_rows(DRY, "resnet20", "mid-50", 1, "bfloat16", "gatedconv")
    monkeypatch.setattr(parity, "tiled_conv", lambda machine, x, w, b, o, residual, dtype, tile: residual.relu())
    row = parity.conv_row(DRY, "float16", (1, 1))
    assert row.failed and "allowed" in (row.note or "")


def test_floors_of_parity_follow_from_the_table_of_tolerances() -> None:
    for name, kind in parity.DTYPES.items():
        dtype = "tf32" if name == "tf32" else kind
        assert parity.UNIT_ROUNDOFF[name] == UNIT_ROUNDOFF[dtype] < parity.floor_of(name)
        assert parity.floor_of(name) == tolerance(dtype, terms=parity.TERMS) * 2 / SAFETY
    assert parity.GRADIENT_FLOOR == tolerance(algorithm="gradient")


def test_a_kernel_that_writes_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        parity, "tiled_conv", lambda machine, x, w, b, o, residual, dtype, tile: torch.empty_like(residual)
    )
    assert parity.conv_row(DRY, "float16", (1, 1)).error == float("inf")


def test_repeats_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = parity._step, iter(range(100))

    def noisy(*arguments: object) -> list[torch.Tensor]:
        found = real(*arguments)  # type: ignore[arg-type]
        return [found[0] + 1e-7 * next(count), *found[1:]]

    monkeypatch.setattr(parity, "_step", noisy)
    assert [row.note for row in parity.gate_rows(DRY)] == ["passed", "failed: repeats differ"]


@pytest.mark.parametrize("layer", engine_timings.LAYERS[:3], ids=lambda layer: layer.name)
def test_both_peers_of_a_layer_compute_the_same(layer: engine_timings.LayerCase) -> None:
    calls = engine_timings.layer_providers(DRY, layer, 2, torch.float32)
    compact, dense = calls["compact cudnn"][0](), calls["dense cudnn"][0]()
    torch.testing.assert_close(compact, dense)
    outputs = layer.outputs if layer.open < layer.outputs else layer.open
    assert compact.shape == (2, outputs, layer.size, layer.size) and bool((compact >= 0).all())


def test_candidates_of_the_tuner_become_rows(tmp_path: Path) -> None:
    choices = {
        "conv 16": {"candidate": "cudnn", "ms": {"cudnn": 0.5, "gatedconv 1x1": 0.7}, "out": {"x": "wrong result"}}
    }
    (tmp_path / "tuned-1.json").write_text(json.dumps({"choices": choices}))
    case_ = engine_timings.NetworkCase("resnet56", "mid-50", 32)
    rows = list(engine_timings._candidates(tmp_path, case_, "float16", "gatedconv"))
    assert [(row.provider, row.ms_median, row.note) for row in rows] == [
        ("cudnn", 0.5, "chosen"),
        ("gatedconv 1x1", 0.7, None),
        ("x", None, "failed: wrong result"),
    ]


@pytest.mark.parametrize(("batch", "images"), [(1, 64), (48, 96), (256, 256)])
def test_errors_are_of_64_images_or_more_in_batches(batch: int, images: int) -> None:
    x, sizes, memory = torch.randn(batch, 2), set(), torch.empty(batch, 2)

    def run(part: torch.Tensor) -> torch.Tensor:
        sizes.add(len(part))
        return memory.copy_(part)  # as a graph does: the next call overwrites it

    several = engine_timings._several(x, 64)
    assert len(several) == images and torch.equal(several[:batch], x)
    assert torch.equal(engine_timings._batched(run, several, batch), several) and sizes == {batch}


def test_eager_rows_have_the_time_of_the_host_alone() -> None:
    notes = {row.provider: row.note for row in gate_timings.gate_rows(DRY, "layer", 16, 4)}
    assert all((notes[provider] or "").startswith("the host alone: ") for provider in ("eager", "gatedconv"))
    assert notes["eager graph"] is None and notes["gatedconv graph"] is None


def test_a_gate_step_has_gradients_of_input_and_parameters() -> None:
    made = gate_timings.make_gate("channel", 3, 4)
    x = torch.randn(4, 3, 4, 4, requires_grad=True)
    grads = gate_timings.gate_steps(made, [x, x.detach().clone().requires_grad_()])[1]()
    assert len(grads) == 1 + len(list(made.parameters())) and grads[0].shape == x.shape


def test_a_scale_step_has_the_gradients_of_map_and_gate() -> None:
    x, gates = torch.randn(4, 3, 2, 2, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    grads = gate_timings.scale_steps(gates, [x])[0]()
    assert [grad.shape for grad in grads] == [x.shape, gates.shape]
    # Both are sums of gate * x * incoming, over C, H and W and over C.
    assert_close((grads[0] * x).sum((1, 2, 3)), (grads[1] * gates).sum(1), terms=x[0].numel(), scale=1.0)


def test_a_training_step_moves_the_network() -> None:
    step = training_timings.training_step(DRY, 8, "channel", 4, None)
    first, second = float(step()), float(step())
    assert first != second


def test_the_harness_restores_what_it_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEDCONV_X", "before")
    with variable("GATEDCONV_X", "now"), variable("GATEDCONV_Y", "set"), variable("GATEDCONV_X", None):
        assert (os.environ["GATEDCONV_X"], os.environ["GATEDCONV_Y"]) == ("now", "set")
    assert os.environ["GATEDCONV_X"] == "before" and "GATEDCONV_Y" not in os.environ
    before = torch.backends.cudnn.conv.fp32_precision, torch.are_deterministic_algorithms_enabled()
    with precision("tf32"), poisoned():
        assert torch.backends.cudnn.conv.fp32_precision == "tf32" and torch.empty(3).isnan().all()
    assert (torch.backends.cudnn.conv.fp32_precision, torch.are_deterministic_algorithms_enabled()) == before


def test_kernels_are_counted_without_copies() -> None:
    events = [
        ("CUDA", "gate_rows"),
        ("CUDA", "Memcpy DtoD"),
        ("CUDA", "Memset"),
        ("CPU", "aten::add"),
        ("CUDA", "conv"),
    ]
    assert count_kernels(events) == 2


def test_the_stand_in_is_installed_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "STAND_IN", "no.such.module")
    with cases.stand_in(DRY) as installed:
        assert installed is None
    module = type(sys)("fake_stand_in")
    module.installed = lambda: variable("GATEDCONV_Z", "interpreter")  # type: ignore[attr-defined]
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("fake_stand_in", None)
    monkeypatch.setitem(sys.modules, "fake_stand_in", module)
    monkeypatch.setattr(cases, "STAND_IN", "fake_stand_in")
    with cases.stand_in(DRY):
        assert os.environ["GATEDCONV_Z"] == "interpreter"


def test_committed_rows_are_all_shown_with_their_failures(tmp_path: Path) -> None:
    assert section(tmp_path) == "**Not measured yet on any GPU.**"
    rows = [Row("parity", "c", 0, "float16", "gatedconv", note="failed: error 1.0e-01", error=0.1)]
    rows += [Row("gate", "g", 1, "float32", "eager", ms_median=1.0, ms_min=0.9, ms_iqr=0.05)]
    rows += [Row("gate", "g", 1, "float32", "gatedconv", ms_median=0.5, ms_min=0.45)]
    for case_, times, chosen in (
        ("net: run of 59 a1", {"layers": 0.5, "resident x1": 0.25}, "resident x1"),
        ("net: off float16 1x16", {"cudnn fused": 0.1, "gatedconv 1x1": 0.2}, "cudnn fused"),
        ("net: off float16 1x32", {"cudnn fused": 0.1, "gatedconv 1x1": 0.05}, "gatedconv 1x1"),
        ("net: off float16 1x64", {"cudnn": 0.2, "cudnn fused": 0.1}, "cudnn fused"),
    ):
        for provider, ms in times.items():
            note = "chosen" if provider == chosen else None
            rows.append(Row("candidate", case_, 32, "float16", provider, "gatedconv", ms_median=ms, note=note))
    command.save(tmp_path, rows)
    (tmp_path / "gpu.json").rename(tmp_path / "gpu-h200.json")
    text = section(tmp_path)
    assert "| parity | c |  | float16 | gatedconv |  |  |  |  | 1.0e-01 | failed: error 1.0e-01 |" in text
    assert "| gate | g | 1 | float32 | eager | 1.0000 | 0.9000 | 0.0500 | 1.00 |  |" in text and "### h200" in text
    assert "| gate | g | 1 | float32 | gatedconv | 0.5000 | 0.4500 |  | 2.00 |  |" in text
    assert "| net | run of 59 | 32 | layers 0.500, resident x1 0.250 |" in text
    assert "the tuner measured 2 and took ours in 1;" in text
