from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from gatedconv.cli.progress import BarListener, LineListener, describe, make_listener
from gatedconv.data import load_data
from gatedconv.train import EpochMetrics, TrainConfig
from gatedconv.train.loop import StepReport
from tests.image_files import write_npz

METRICS = EpochMetrics(
    "gated", 2, 0.1, 0.5, 90.0, 0.4, 91.25, 3.0, polarization=0.0123, macs=0.455, open_rate=0.5,
    gates_dead=1, gates_saturated=2, num_gates=9,
)  # fmt: skip


def test_a_line_has_every_figure() -> None:
    assert describe(METRICS) == "loss 0.500  top-1 91.25 %  open 50.0%  polar 0.0123  MACs 45.5%  dead 1/9"
    assert describe(EpochMetrics("dense", 1, 0.1, 0.5, 90.0, 0.4, 91.25, 3.0)) == "loss 0.500  top-1 91.25 %"


def test_lines_and_bars_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(epochs=4, data=f"npz:{write_npz(tmp_path / 'a.npz')}")
    data = load_data(config.data)
    screen = io.StringIO()
    progress = Progress(
        "{task.description} {task.completed} {task.fields[place]} {task.fields[figures]}",
        console=Console(file=screen, width=200), auto_refresh=False,
    )  # fmt: skip
    bar = BarListener(progress)
    for listener in (LineListener(), bar):
        listener.start(config, data)
        listener.phase("gated")
        listener.step(StepReport("gated", 1, 1, 2, 0.7, 55.0))
        if listener is bar:
            assert progress.tasks[-1].completed == 0.5
        listener.epoch(METRICS)
        listener.note("look here")
        if listener is bar:
            assert progress.tasks[-1].completed == 2.0 and progress.tasks[-1].total == 4.0
            assert progress.tasks[-1].fields["figures"] == describe(METRICS)
            listener.step(StepReport("gated", 3, 1, 2, 0.7, 55.0))
            assert progress.tasks[-1].completed == 2.5
            assert progress.tasks[-1].fields["figures"].startswith("loss 0.700  top-1 91.25 %  open 50.0%")
        listener.phase("finish")
    printed = capsys.readouterr().out
    for text in (printed, screen.getvalue()):
        assert "resnet20 (layer gates, ste)" in text and "note: look here" in text
    assert "gated 2/4" in printed and "left" in printed and describe(METRICS) in printed


def test_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with make_listener() as listener:
        assert isinstance(listener, LineListener)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with make_listener() as listener:
        assert isinstance(listener, BarListener)
        listener.phase("gated")
        listener.step(StepReport("gated", 1, 1, 2, 0.7, 55.0))
