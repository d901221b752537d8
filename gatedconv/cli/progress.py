"""Live progress: a bar on a terminal, a line per epoch anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gatedconv.data import ImageData
from gatedconv.train.config import TrainConfig
from gatedconv.train.listener import Listener
from gatedconv.train.loop import StepReport
from gatedconv.train.metrics import EpochMetrics

_FINISH = "freezing, cutting, measuring, exporting"


def make_listener() -> AbstractContextManager[Listener]:
    """A listener for stdout: a bar if it is a terminal, lines if not."""
    return _bar() if sys.stdout.isatty() else _lines()


def describe(metrics: EpochMetrics, loss: float | None = None) -> str:
    """One line of an epoch's figures; `loss`, of the epoch that runs, takes the place of its own."""
    text = f"loss {metrics.train_loss if loss is None else loss:.3f}  top-1 {metrics.test_top1:5.2f} %"
    if metrics.num_gates:
        text += f"  open {metrics.open_rate:5.1%}  polar {metrics.polarization:.4f}  MACs {metrics.macs:5.1%}"
        if metrics.gates_dead:
            text += f"  dead {metrics.gates_dead}/{metrics.num_gates}"
    return text


class LineListener(Listener):
    """Plain lines, for logs."""

    def __init__(self) -> None:
        self._epochs = 0
        self._heard = 0
        self._began = time.monotonic()

    def start(self, config: TrainConfig, data: ImageData) -> None:
        """Say what is trained on what."""
        self._epochs = config.epochs
        print(headline(config, data), flush=True)

    def phase(self, phase: str) -> None:
        """Begin counting anew."""
        self._heard, self._began = 0, time.monotonic()
        if phase == "finish":
            print(_FINISH, flush=True)

    def epoch(self, metrics: EpochMetrics) -> None:
        """One line: where the run is, its figures, the time left."""
        self._heard += 1
        left = (time.monotonic() - self._began) / self._heard * (self._epochs - metrics.epoch)
        place = f"{metrics.phase:<5} {metrics.epoch:>{len(str(self._epochs))}}/{self._epochs}"
        print(f"{place}  {describe(metrics)}  {_clock(left)} left", flush=True)

    def note(self, text: str) -> None:
        """Print a note."""
        print(f"note: {text}", flush=True)


class BarListener(Listener):
    """A bar per training, moving with every step.

    Args:
        progress: a `rich.progress.Progress` whose columns read the task's field `figures`.
    """

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._epochs = 0
        self._task: Any = None
        self._last: EpochMetrics | None = None

    def start(self, config: TrainConfig, data: ImageData) -> None:
        """Say what is trained on what."""
        self._epochs = config.epochs
        self._progress.console.print(headline(config, data), highlight=False)

    def phase(self, phase: str) -> None:
        """Begin a bar."""
        self._last = None
        total = None if phase == "finish" else float(self._epochs)
        self._task = self._progress.add_task(phase, total=total, figures=_FINISH if total is None else "", place="")

    def step(self, report: StepReport) -> None:
        """Move the bar within an epoch."""
        figures = f"loss {report.loss:.3f}  top-1 {report.top1:5.2f} % (training batches)"
        if self._last is not None:
            figures = describe(self._last, report.loss)
        self._update(report.epoch - 1 + report.step / report.steps, report.epoch, figures)

    def epoch(self, metrics: EpochMetrics) -> None:
        """Show the figures of the epoch."""
        self._last = metrics
        self._update(float(metrics.epoch), metrics.epoch, describe(metrics))

    def note(self, text: str) -> None:
        """Print a note above the bars."""
        self._progress.console.print(f"note: {text}", highlight=False, markup=False)

    def _update(self, completed: float, epoch: int, figures: str) -> None:
        self._progress.update(self._task, completed=completed, place=f"{epoch}/{self._epochs}", figures=figures)


def headline(config: TrainConfig, data: ImageData) -> str:
    """What is trained on what, in one line."""
    channels, height, width = data.image_shape
    gates = "no gates" if config.gate == "none" else f"{config.gate} gates, {config.estimator}"
    return (
        f"{config.model} ({gates}) on {config.data}: {len(data.train_labels):,} train and "
        f"{len(data.test_labels):,} {config.evaluate_on} images of {height}x{width}x{channels}, "
        f"{data.num_classes} classes, seed {config.seed}"
    )


@contextmanager
def _lines() -> Iterator[Listener]:
    yield LineListener()


@contextmanager
def _bar() -> Iterator[Listener]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("[bold]{task.description:<6}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[place]:>7}"),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        refresh_per_second=8,
    )
    with progress:
        yield BarListener(progress)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
