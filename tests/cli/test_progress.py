from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from gatedconv.cli import progress
from gatedconv.cli.progress import BarProgress, LineProgress, describe, make_progress
from gatedconv.data import load_data
from gatedconv.train import EpochMetrics, TrainConfig
from gatedconv.train.callbacks import StepReport
from tests.image_files import write_npz

METRICS = EpochMetrics(
    "gated",
    2,
    0.1,
    0.5,
    90.0,
    0.4,
    91.25,
    3.0,
    polarization=0.0123,
    macs=0.455,
    open_rate=0.5,
    gates_dead=1,
    gates_saturated=2,
    num_gates=9,
)


def bar() -> tuple[BarProgress, Progress, io.StringIO]:
    screen = io.StringIO()
    shown = Progress(
        "{task.description} {task.completed} {task.fields[place]} {task.fields[figures]}",
        console=Console(file=screen, width=200),
        auto_refresh=False,
    )
    return BarProgress(shown), shown, screen


def test_a_line_has_every_figure() -> None:
    assert describe(METRICS) == "loss 0.500  accuracy 91.25 %  open  50.0%  undecided   4.9%  MACs  45.5%"
    assert describe(EpochMetrics("dense", 1, 0.1, 0.5, 90.0, 0.4, 91.25, 3.0)) == "loss 0.500  accuracy 91.25 %"


def test_lines_and_bars_have_the_same_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(epochs=4, data=f"npz:{write_npz(tmp_path / 'a.npz')}")
    data = load_data(config.data)
    callback, shown, screen = bar()
    for each in (LineProgress(), callback):
        each.start(config, data)
        each.phase("gated")
        each.step(StepReport("gated", 1, 1, 2, 0.7, 55.0))
        if each is callback:
            assert shown.tasks[-1].completed == 0.5
        each.epoch(METRICS)
        each.note("look here")
        if each is callback:
            assert shown.tasks[-1].completed == 2.0 and shown.tasks[-1].total == 4.0
            assert shown.tasks[-1].fields["figures"] == describe(METRICS)
            each.step(StepReport("gated", 3, 1, 2, 0.7, 55.0))
            assert shown.tasks[-1].completed == 2.5
            assert shown.tasks[-1].fields["figures"].startswith("loss 0.700  accuracy 91.25 %  open  50.0%")
        each.phase("compact")
        each.epoch(dataclasses.replace(METRICS, phase="compact", epoch=3))
        each.phase("finish")
    printed = capsys.readouterr().out
    for text in (printed, screen.getvalue()):
        assert "resnet20 (layer gates, ste)" in text and "note: look here" in text
        assert "each line: training loss, accuracy" in " ".join(text.split())
    assert "gated   2/4" in printed and "left" in printed and describe(METRICS) in printed
    assert "compact 3/4" in printed and shown.tasks[-2].description == "compact"


def test_epochs_from_a_checkpoint_do_not_count_in_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs are read at once; the third takes a minute, and so will the fourth."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = LineProgress()
    lines._config = TrainConfig(epochs=4)
    lines.phase("gated")
    for epoch in (1, 2):
        lines.replay(dataclasses.replace(METRICS, epoch=epoch))
    now[0] = 60.0
    lines.epoch(dataclasses.replace(METRICS, epoch=3))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("(from the checkpoint)") and second.endswith("(from the checkpoint)")
    assert third.endswith("0:01:00 left")


def test_a_bar_starts_after_the_epochs_from_a_checkpoint() -> None:
    callback, shown, _ = bar()
    callback._config = TrainConfig(epochs=4)
    callback.phase("gated")
    callback.replay(METRICS)
    assert shown.tasks[-1].completed == 2.0 and shown.tasks[-1].speed is None


def test_phases_count_their_own_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(epochs=4, consensus_at=0.5, data=f"npz:{write_npz(tmp_path / 'a.npz')}")
    data = load_data(config.data)
    callback, shown, _ = bar()
    for each in (LineProgress(), callback):
        each.start(config, data)
        for phase, epoch in (("gated", 2), ("compact", 3)):
            each.phase(phase)
            each.epoch(dataclasses.replace(METRICS, phase=phase, epoch=epoch))
    gated, compact = capsys.readouterr().out.splitlines()[2:4]
    assert gated.startswith("gated   2/2") and gated.endswith("0:00:00 left") and compact.startswith("compact 3/4")
    done = [(task.completed, task.total, task.fields["place"]) for task in shown.tasks]
    assert done == [(2.0, 2.0, "2/2"), (1.0, 2.0, "3/4")]


def test_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress() as callback:
        assert isinstance(callback, LineProgress)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with make_progress() as callback:
        assert isinstance(callback, BarProgress)
        callback.phase("gated")
        callback.step(StepReport("gated", 1, 1, 2, 0.7, 55.0))
