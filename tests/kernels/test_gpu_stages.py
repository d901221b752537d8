"""What of ``make gpu`` works without a GPU: arguments, time limits, files, tables."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import gates, session, tables, timing, training
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.stages import all_stages, stage

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}
FIELDS = {
    "benchmark",
    "case",
    "batch",
    "dtype",
    "provider",
    "ms_median",
    "ms_min",
    "ms_iqr",
    "launches",
    "bytes_peak",
}


@pytest.fixture
def run(tmp_path):
    return Session("h200", VERSIONS, tmp_path)


def row(provider="eager", ms=2.0, **more):
    return Row("gate", "layer 16x32x32", 256, "float32", provider, ms, ms, 0.1, **more)


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
    assert run.path.name == f"h200-2.11.0-{body['commit']}.json"
    assert {"device", "torch", "triton", "cuda", "commit", "date", "rows"} <= body.keys()
    assert record.read(run.path) == body  # all result files read alike
    assert len(body["rows"]) == 2 and all(FIELDS <= r.keys() for r in body["rows"])
    assert [path.suffix for path in run.path.parent.iterdir()] == [".json"]


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(run, tmp_path):
    run.add(row())
    run.add(row("gatedconv", 0.5))
    Session("h200", VERSIONS, tmp_path).add(row("gatedconv", 0.4))
    rows = json.loads(run.path.read_text())["rows"]
    assert {r["provider"]: r["ms_median"] for r in rows} == {"eager": 2.0, "gatedconv": 0.4}


def test_table_gives_speed_against_the_baseline_and_leaves_gaps_blank(run):
    run.add(row())
    run.add(row("gatedconv", 0.5, launches=4))
    run.add(Row("gate", "layer 16x32x32", 256, "float32", "compile", note="failed: out of memory"))
    head, rule, *lines = run.table("eager").splitlines()
    assert head.split()[:4] == ["case", "batch", "dtype", "provider"] and set(rule) == {"-"}
    assert lines[1].split()[-3:] == ["0.100", "4.00", "4"]
    assert "failed: out of memory" in lines[2] and "0.000" not in lines[2]


def test_time_left_runs_down_to_the_limit(tmp_path):
    assert Session("h200", VERSIONS, tmp_path).has(60)
    assert not Session("h200", VERSIONS, tmp_path, limit_s=50).has(60)
    assert session.LIMIT_S <= 9 * 60 - 30


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


def test_stages_measure_what_there_is_time_for(monkeypatch, run, capsys):
    """What compiles is not begun when it would not end in time; what was measured is printed last."""
    monkeypatch.setattr(gates, "measure_gate", lambda case, *rest: row(rest[6]))
    run.limit_s = gates.COMPILE_S
    assert gates.bench_gates(run, batches=(256,)) == 0
    providers = {r.provider for r in run.rows}
    assert providers == {"eager", "eager-graph", "gatedconv", "gatedconv-graph"}
    assert capsys.readouterr().out.startswith("case")
    run.limit_s = 0
    run.rows.clear()
    assert gates.bench_gates(run) == 0 and run.rows == []


def test_slow_training_cases_come_last(monkeypatch, run):
    order = []
    monkeypatch.setattr(training, "measure_step", lambda *a: order.append(a[-1][2]) or row(a[-2]))
    training.bench_resnet(run, 56)
    assert order == sorted(order) and True in order and False in order


def test_a_stage_has_one_name():
    assert list(all_stages())[:4] == ["check", "bench-gates", "bench-resnet56", "bench-resnet110"]
    with pytest.raises(ValueError, match="'check' is registered twice"):
        stage("check")(lambda _: 0)


@pytest.mark.parametrize("kind", gates.GATES)
def test_what_is_timed_is_forward_and_backward_of_a_gate(kind):
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    gate = gates.make_gate(kind, 3, 2)
    grads = gates.gate_step(gate, x)()
    assert [g.shape for g in grads] == [x.shape, *(p.shape for p in gate.parameters())]
    assert grads[0].any()


def test_the_switch_is_put_back(monkeypatch):
    import os

    monkeypatch.setenv("GATEDCONV_TRITON", "auto")
    with gates.kernels("off"):
        assert os.environ["GATEDCONV_TRITON"] == "off"
    assert os.environ["GATEDCONV_TRITON"] == "auto"


def test_the_document_is_what_the_result_files_say():
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.gpu.tables"


def test_document_cells_are_blank_until_measured_and_goals_are_judged(run):
    empty = tables.gate_section([])
    assert "| layer 16x32x32 |  |  |  |  |  |  |  |  |  |" in empty and "Not measured yet" in empty
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
