"""What of ``make gpu`` works without a GPU: arguments, time limits, files, tables, and every stage dry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import check, gates, session, stages, tables, timing, training, watch
from benchmarks.gpu.session import ROOT, Row, Session, table
from benchmarks.gpu.stages import Case, find_stage, run_cases, stage, stage_names

VERSIONS = {"torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0"}
FIELDS = {
    "benchmark", "case", "batch", "dtype", "provider", "ms_median", "ms_min", "ms_iqr", "launches", "bytes_peak"
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return Session("h200", VERSIONS, tmp_path, progress=tmp_path / "progress")


def row(provider="eager", ms=2.0, **more):
    return Row("gate", "layer 16x32x32", 256, "float32", provider, ms, ms, 0.1, **more)


def case(name="a", seconds=1.0, run=lambda: {"ms_median": 1.0}):
    return Case(("gate", name, 1, "float32", "eager"), seconds, run)


def test_no_gpu_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["check"]) == 2
    assert capsys.readouterr().err == "gpu: no CUDA device is visible; the stages need one\n"


def test_an_unknown_stage_is_named(capsys):
    assert command.main(["bench-gate"]) == 2
    assert "no stage 'bench-gate'; there are: check, bench-gates" in capsys.readouterr().err


def test_every_row_is_on_the_disk_at_once(run):
    run.add(row())
    run.add(row("gatedconv", 0.5, launches=4, bytes_peak=1024))
    body = json.loads(run.path.read_text())
    assert run.path.name == f"h200-2.11.0-cu130-{body['commit']}.json"
    assert {"device", "torch", "triton", "cuda", "commit", "date", "rows"} <= body.keys()
    assert record.read(run.path) == body  # all result files read alike
    assert len(body["rows"]) == 2 and all(FIELDS <= r.keys() for r in body["rows"])
    assert sorted(path.suffix for path in run.path.parent.iterdir()) == ["", ".json"]


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(run, tmp_path):
    run.add(row())
    run.add(row("gatedconv", 0.5))
    Session("h200", VERSIONS, tmp_path).add(row("gatedconv", 0.4))
    rows = json.loads(run.path.read_text())["rows"]
    assert {r["provider"]: r["ms_median"] for r in rows} == {"eager": 2.0, "gatedconv": 0.4}


def test_table_gives_speed_against_the_baseline_and_leaves_gaps_blank():
    rows = [row(), row("gatedconv", 0.5, launches=4)]
    rows.append(Row("gate", "layer 16x32x32", 256, "float32", "compile", note="failed: out of memory"))
    head, rule, *lines = table(rows, "eager").splitlines()
    assert head.split()[:4] == ["case", "batch", "dtype", "provider"] and set(rule) == {"-"}
    assert lines[1].split()[-3:] == ["0.100", "4.00", "4"]
    assert "failed: out of memory" in lines[2] and "0.000" not in lines[2]


def test_time_left_runs_down_to_the_limit(tmp_path):
    assert Session("h200", VERSIONS, tmp_path).has(60)
    assert not Session("h200", VERSIONS, tmp_path, limit_s=50).has(60)
    assert session.LIMIT_S < watch.KILL_S <= 8.5 * 60


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "h200"), ("Tesla T4", "t4"), ("NVIDIA GeForce RTX 4090", "rtx-4090"),
     ("NVIDIA A100-SXM4-80GB", "a100"),
     ("NVIDIA H100 80GB HBM3", "h100")],
)  # fmt: skip
def test_devices_have_short_names(device, name):
    assert session.short_name(device) == name


def test_copies_and_fills_are_no_launches():
    events = [
        ("CPU", "aten::mm"),
        ("CUDA", "gate_tail"),
        ("CUDA", "Memset (Device)"),
        ("CUDA", "Memcpy HtoD"),
    ]
    assert timing.count_kernels(events) == 1


def test_cases_run_while_there_is_time_and_failures_are_rows(run):
    """What would not end in time is not begun; what raises is a row; the others run all the same."""
    run.limit_s = 100

    def broken():
        raise MemoryError("all of it\nis gone")

    run_cases(run, iter([case("a"), case("b", 1000.0), case("c", run=broken), case("d")]))
    assert [(r.case, r.ms_median) for r in run.rows] == [("a", 1.0), ("c", None), ("d", 1.0)]
    assert run.rows[1].note == "failed: MemoryError: all of it" and run.rows[1].failed


def test_a_stage_that_ran_out_of_time_goes_on(run, tmp_path):
    """What was measured is kept, what failed is tried again; another commit's rows are no measurement."""
    run_cases(run, iter([case("a"), case("b", run=lambda: {"note": "failed: once"}), case("c", 1e6)]))
    calls = []

    def measured():
        calls.append(1)
        return {"ms_median": 2.0}

    later = Session("h200", VERSIONS, tmp_path)
    run_cases(later, iter([case(name, run=measured) for name in "abc"]))
    assert [(r.case, r.ms_median) for r in later.rows] == [("a", 1.0), ("b", 2.0), ("c", 2.0)] and len(calls) == 2
    other = Session("h100", VERSIONS, tmp_path)
    run_cases(other, iter([case("a", run=measured)]))
    assert other.rows[0].ms_median == 2.0


def watched(run, script, kill_s=60.0):
    """Exit code of a stage whose process runs ``script`` with the session's progress file as an argument."""
    return watch.watch([sys.executable, "-c", script, str(run.progress)], run, "eager", kill_s)


def lines(*entries):
    text = "\n".join(json.dumps(entry) for entry in entries) + "\n"
    return f"import sys; open(sys.argv[1], 'w').write({text!r});"


KEY = ["gate", "b", 1, "float32", "eager"]
GOOD = ["row", {**dict(zip(session.KEY, KEY, strict=True)), "case": "a", "ms_median": 1.0}]


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(run, tmp_path, capsys):
    """Its rows are there, the case it hung in is a failed one, and the table comes last."""
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    hang = f"import subprocess, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    assert watched(run, lines(GOOD, ["begin", KEY], ["skip", KEY]) + hang, kill_s=2.0) == 124
    assert time.monotonic() - started < 30
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("case") and "failed: cut off after 2 s" in printed[3]
    assert printed[4:] == ["1 cases were not begun: out of time", "ended after 2 s"]
    kept = json.loads(run.path.read_text())["rows"]
    assert [(r["case"], r["note"]) for r in kept] == [("b", "failed: cut off after 2 s")]
    time.sleep(max(0.0, 5.0 - (time.monotonic() - started)))
    assert not mark.exists(), "what the stage started outlived it"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (lines(GOOD), 0),
        (lines(GOOD, ["row", {**GOOD[1], "note": "failed: no"}]), 1),
        (lines(GOOD, ["begin", KEY]) + "sys.exit(3)", 3),
        (lines(GOOD, ["begin", KEY]) + "import os; os.kill(os.getpid(), 11)", -11),
        ("", 1),
        (lines(["row", {**GOOD[1], "note": "not run: compute-sanitizer is not installed"}]), 0),
    ],
)
def test_exit_codes_tell_failures(run, script, code):
    assert watched(run, script) == code


def test_slow_training_cases_come_last_and_every_provider_is_there(run):
    for depth in (56, 110):
        cases = list(training.bench_resnet(run, depth))
        seconds = [c.seconds > training.GRAPH_S for c in cases]
        assert seconds == sorted(seconds) and True in seconds and False in seconds
        found = {(c.key[1], c.key[2], c.key[4]) for c in cases}
        for batch in (128, 256, 1024):
            assert {(f"resnet{depth} layer gates", batch, p) for p in training.PROVIDERS} <= found
    how = set(training.PROVIDERS.values())
    assert {(False, "off", None, True), (True, "off", "reduce-overhead", False), (True, "auto", None, True)} <= how


def test_every_gate_and_estimator_is_measured_by_every_quick_provider(run):
    found = {(c.key[1], c.key[2], c.key[4]) for c in gates.bench_gates(run)}
    for kind in gates.GATES:
        for name in ("", " gumbel", " bernoulli", " batch_mean", " 1FC"):
            for provider in ("eager", "gatedconv", "gatedconv-graph"):
                assert (f"{kind} 16x32x32{name}", 256, provider) in found


def test_stages_have_one_name_and_a_missing_one_says_so(monkeypatch, capsys):
    assert stage_names()[:4] == ["check", "bench-gates", "bench-resnet56", "bench-resnet110"]
    engine = command.matching("bench-engine")
    assert engine and all(name.startswith("bench-engine") for name in engine)
    assert command.matching("bench-resnet5") == [] and command.matching("check") == ["check"]
    find_stage("check")
    with pytest.raises(ValueError, match="'check' is registered twice"):
        stage("check")(lambda _: iter(()))
    monkeypatch.setitem(stages.MODULES, "not_there", ("bench-nothing",))
    assert find_stage("bench-nothing") is None and command.run_stage("bench-nothing", dry=True) == 0
    assert "bench-nothing: nothing to run" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["", "out"])
def test_rows_are_left_in_out_too(out, tmp_path, monkeypatch):
    """The stage's own process has another working directory."""

    def started(words, *_):
        monkeypatch.chdir(ROOT)
        return command.main(words[3:])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", out)
    monkeypatch.setattr(command, "ROOT", tmp_path / "copy")
    monkeypatch.setattr(command, "watch", started)
    monkeypatch.setattr(command, "find_stage", lambda name: (lambda _: iter([case("a"), case("b")]), "eager"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert command.run_stage("any", dry=False) == 0
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    folders = {tmp_path / "copy" / "benchmarks" / "results"} | ({tmp_path / "out"} if out else set())
    assert {path.parent for path in found} == folders and len(found) == len(folders)
    assert len({path.name for path in found}) == 1 and found[0].name.startswith("h100-")
    for path in found:
        assert [each["case"] for each in json.loads(path.read_text())["rows"]] == ["a", "b"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["bench-gates", "bench-resnet56"])
def test_a_dry_run_walks_through_a_stage(name, run, capsys):
    """Every case on a CPU, as it would run on a GPU but for graphs and the compiler's backend."""
    run.dry = True
    found, baseline = find_stage(name)
    run_cases(run, found(run))
    notes = [(r.case, r.provider, r.note) for r in run.rows if r.failed]
    assert not notes, notes
    providers = gates.PROVIDERS if name == "bench-gates" else training.PROVIDERS
    assert {r.provider for r in run.rows} == set(providers) and all(r.ms_median > 0 for r in run.rows)
    assert table(run.rows, baseline).count("\n") == len(run.rows) + 1


@pytest.mark.timeout(300)
def test_the_command_runs_a_stage_dry_in_a_process_of_its_own():
    """The tests of ``check`` are all skipped here; sanitizers say that they are not installed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--dry", "check"]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("== check\n")
    last = result.stdout.splitlines()[-1 - len(check.TOOLS) :]
    assert last[0].startswith("tests") and "passed" in last[0]
    assert [line.split()[0] for line in last[1:]] == list(check.TOOLS)
    assert not list((ROOT / "benchmarks" / "results").glob("dry-*"))


def test_shards_are_a_partition():
    from benchmarks.gpu.run_tests import Shard

    parts = []
    for i in range(3):
        items = list(range(10))
        Shard(f"{i}/3").pytest_collection_modifyitems(items)
        parts += items
    assert sorted(parts) == list(range(10))


def test_tests_that_fail_fail_the_stage(monkeypatch, run):
    monkeypatch.setattr(check, "PYTEST", (sys.executable, "-c", "raise SystemExit(1)"))
    run_cases(run, (c for c in check.check(run) if c.key[1] == "tests"))
    assert run.rows[0].failed and "8 of 8 shards failed" in run.rows[0].note


@pytest.mark.parametrize("kind", gates.GATES)
def test_what_is_timed_is_forward_and_backward_of_a_gate(kind):
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    gate = gates.make_gate(kind, 3, 2)
    grads = gates.gate_step(gate, x)()
    assert [g.shape for g in grads] == [x.shape, *(p.shape for p in gate.parameters())]
    assert grads[0].any()


def test_the_switch_is_put_back(monkeypatch):
    monkeypatch.setenv("GATEDCONV_TRITON", "auto")
    with gates.kernels("off"):
        assert os.environ["GATEDCONV_TRITON"] == "off"
    assert os.environ["GATEDCONV_TRITON"] == "auto"


def test_the_document_is_what_the_result_files_say():
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.gpu.tables"


def test_document_cells_are_blank_until_measured_and_goals_are_judged(run):
    empty = tables.gate_section([])
    assert f"| layer 16x32x32 |{'  |' * (len(tables.GATE_PROVIDERS) + 4)}" in empty and "Not measured yet" in empty
    for provider, ms, launches in (
        ("eager", 3.0, 40),
        ("gatedconv", 1.5, 4),
        ("gatedconv-graph", 0.25, None),
    ):
        run.add(row(provider, ms, launches=launches))
    run.add(row("compile-reduce-overhead", 0.75))
    section = tables.gate_section([json.loads(run.path.read_text())])
    (line,) = (text for text in section.splitlines() if text.startswith("| layer 16x32x32 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "3.000",
        "",
        "0.750",
        "",
        "1.500",
        "0.250",
        "2.0, missed",
        "12.0, met",
        "3.0, met",
        "4, met",
    ]
