"""How 3x3 convolutions are computed: the estimate, the measured choice and its file, the benchmark's command."""

import json
import re
from dataclasses import astuple

import pytest
import torch
from torch import nn

import gatedconv
from benchmarks import kernels
from gatedconv.engine import time_on_cpu
from gatedconv.engine.choose import ALGORITHMS, RATES, Rates, Work
from gatedconv.ops.plan import unavailable
from tests.engine.nets import error, settle
from tests.tolerances import assert_close, tolerance

PATTERN = [0.5, 0.9, 1.0, 0.5, 0.25, 1.0, 0.5, 0.9, 1.0]  # three rounds; the second algorithm is disturbed twice


@pytest.fixture
def fake_times(monkeypatch, tmp_path):
    """Calls timed by a list instead of a clock: winograd2 is the fastest."""
    monkeypatch.setenv("GATEDCONV_CACHE", str(tmp_path))
    timed = []

    def least_ms(call, clock=None):
        call()
        timed.append(PATTERN[len(timed) % len(PATTERN)])
        return timed[-1]

    monkeypatch.setattr(time_on_cpu, "least_ms", least_ms)
    return timed


def ops(engine):
    return [step.op for plan in engine.plans for step in plan.steps if step.op in ALGORITHMS]


def test_tune_takes_the_fastest_algorithm_and_remembers_it(fake_times, tmp_path):
    model = settle(nn.Sequential(nn.Conv2d(8, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 3, 1, 1)))
    x = torch.randn(2, 8, 12, 12)
    engine = gatedconv.Engine(model, x, threads=1, tune=True)
    assert ops(engine) == ["winograd2", "conv", "winograd2"]
    assert len(fake_times) == 9  # the two 3x3 layers are of one size
    assert error(engine(x), model, x) <= tolerance()
    (path,) = tmp_path.glob("tuned-*.json")
    found = json.loads(path.read_text())
    assert found["threads"] == 1 and list(found["choices"]) == ["n2 i8 o24 h12 w12 k3"]
    assert ops(gatedconv.Engine(model, x, threads=1, tune=True)) == ["winograd2", "conv", "winograd2"]
    assert len(fake_times) == 9
    gatedconv.Engine(model, x, threads=2, tune=True)
    assert len(fake_times) == 18  # another number of threads is another machine


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: re.sub(r'"out": \{\}', '"out": null', text),
        lambda text: re.sub(r'"out": \{\}', '"out": 5', text),
        lambda text: re.sub(r'"candidate": "\w+"', '"candidate": null', text),
        lambda text: re.sub(r'"ms": \{[^}]*\}', '"ms": ["winograd2"]', text),
    ],
)
def test_a_damaged_file_is_measured_again(damage, fake_times, tmp_path):
    net, x = nn.Sequential(nn.Conv2d(8, 24, 3, 1, 1)).eval(), torch.randn(1, 8, 9, 9)
    gatedconv.Engine(net, x, threads=1, tune=True)
    (path,) = tmp_path.glob("tuned-*.json")
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    assert ops(gatedconv.Engine(net, x, threads=1, tune=True)) == ["winograd2"]
    assert len(fake_times) == 18 and json.loads(path.read_text())["choices"]


def test_without_images_one_is_measured(fake_times, tmp_path):
    net = nn.Sequential(nn.Conv2d(8, 24, 3, 1, 1)).eval()
    engine = gatedconv.Engine(net, torch.zeros(0, 8, 9, 9), threads=1, tune=True)
    assert ops(engine) == ["winograd2"] and engine(torch.zeros(0, 8, 9, 9)).shape == (0, 24, 9, 9)
    (path,) = tmp_path.glob("tuned-*.json")
    assert list(json.loads(path.read_text())["choices"]) == ["n1 i8 o24 h9 w9 k3"]


def test_processors_of_one_name_are_told_apart(fake_times, monkeypatch, tmp_path):
    net, x = nn.Sequential(nn.Conv2d(8, 24, 3, 1, 1)).eval(), torch.randn(1, 8, 9, 9)
    for model in ("167", "168"):
        monkeypatch.setattr(time_on_cpu, "cpu_info", {"model name": "Processor", "model": model}.get)
        gatedconv.Engine(net, x, threads=1, tune=True)
    found = [json.loads(path.read_text())["cpu"] for path in tmp_path.glob("tuned-*.json")]
    assert sorted(found) == ["Processor 167", "Processor 168"]


def test_every_algorithm_computes_the_same_for_the_tuner(monkeypatch, tmp_path):
    monkeypatch.setenv("GATEDCONV_CACHE", str(tmp_path))
    assert unavailable() is None
    layer = kernels.layer_of(Work(2, 19, 37, 11, 11))
    results = [time_on_cpu.layer_call(layer, 2, name, 1)() for name in ALGORITHMS]
    for name, result in zip(ALGORITHMS, results, strict=True):
        algorithm = "direct" if name == "conv" else name
        assert_close(result, results[0], algorithm=algorithm, terms=9 * 19, name=name)


def test_work_is_counted():
    work = Work(2, 8, 16, 9, 10)
    assert work.amounts("conv") == (9 * 8 * 16 * 90, 0, 0, 0, 9 * 8 * 16 / 2)
    assert work.amounts("winograd2") == (0, 5 * 5 * 16 * 8 * 16, 5 * 5 * 16 * 24, 0, 16 * 8 * 16 / 2)
    assert work.amounts("winograd4") == (0, 3 * 3 * 36 * 8 * 16, 0, 3 * 3 * 36 * 24, 36 * 8 * 16 / 2)
    heavy = Work(4, 512, 512, 7, 7)
    assert heavy.amounts("conv")[4] == 9 * 2**18 / 4
    assert heavy.estimate("conv", Rates(1, 0, 0, 0, 2)) == 49 * 9 * 2**18 + 9 * 2**17


def test_rates_are_found_again_from_their_own_times():
    rates = Rates(1.0, 1.5, 5.0, 7.0, 30.0)
    cases = ["n1 i64 o64 h56", "n8 i512 o512 h7", "n1 i512 o256 h7", "n8 i16 o16 h32", "n1 i24 o96 h30"]
    works = {case: kernels.parse(case) for case in cases}
    rows = [
        {"case": case, "ms": {name: 1e-9 * work.batch * work.estimate(name, rates) for name in ALGORITHMS}}
        for case, work in works.items()
    ]
    assert kernels.fit(rows) == rates


def test_the_rates_are_those_of_the_committed_times():
    rows = [row for path in kernels.RESULTS.glob(kernels.FITTED) for row in json.loads(path.read_text())["rows"]]
    assert astuple(kernels.fit(rows)) == pytest.approx(astuple(RATES), rel=0.01)


def test_the_command_fails_where_the_choice_is_slow(monkeypatch, capsys):
    times = {"conv": 1.0, "winograd2": 1.2, "winograd4": 1.0}
    monkeypatch.setattr(kernels, "time_algorithms", lambda work: times)
    monkeypatch.setattr(kernels, "chosen", lambda work: "winograd2")
    assert kernels.main(["n1 i8 o8 h8"]) == 1
    times["winograd2"] = 1.04
    assert kernels.main(["n1 i8 o8 h8"]) == 0
    assert "n1 i8 o8 h8" in capsys.readouterr().out


def test_the_page_says_how_often_the_choice_is_near_the_best(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    assert kernels.section() == "Not measured yet."
    rows = [
        {"case": f"n1 i8 o8 h{size}", "ms": {"conv": 1.0, "winograd2": ms, "winograd4": 2.0}}
        for size, ms in ((8, 1.04), (16, 1.5), (32, 0.5), (64, 0.9))
    ]
    machine = {"cpu": "Processor", "commit": None, "date": "2026-01-02T03:04Z"}
    (tmp_path / "kernels-a.json").write_text(json.dumps({"machine": machine, "isa": "avx512", "rows": rows}))
    monkeypatch.setattr(kernels, "chosen", lambda work: "winograd2")
    monkeypatch.setattr(kernels, "WORST", 2)
    text = kernels.section()
    assert "in 3 of 4 cases (75%), and 11.8% longer" in text  # (1.04 * 1.5)^(1/4)
    assert text.index("| n1 i8 o8 h16 |") < text.index("| n1 i8 o8 h8 |") and "h32" not in text


@pytest.mark.parametrize("case", ["", "n1 i8 o8", "n0 i8 o8 h8", "i8 o8 h8 k3"])
def test_no_case(case):
    with pytest.raises(ValueError, match="^case "):
        kernels.parse(case)
