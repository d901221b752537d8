"""Live progress: a bar on a terminal, a line per epoch anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from gatedconv.data import ImageData
from gatedconv.train.callbacks import Callback, StepReport
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.metrics import EpochMetrics

_FINISH = "freezing, compacting, measuring, exporting"
_COLUMNS = "each line: training loss, accuracy on the evaluation images"
_GATE_COLUMNS = (
    "; open gates; undecided gates (0 % where all images agree on every gate); MACs, as a share of the dense network's"
)


def make_progress() -> AbstractContextManager[Callback]:
    """A callback that prints to stdout: a bar if it is a terminal, lines if not."""
    return _bar() if sys.stdout.isatty() else nullcontext(LineProgress())


def describe(metrics: EpochMetrics, loss: float | None = None) -> str:
    """One line of an epoch's figures; `loss`, of the running epoch, replaces its own."""
    text = f"loss {metrics.train_loss if loss is None else loss:.3f}  accuracy {metrics.test_top1:5.2f} %"
    if metrics.open_rate is not None and metrics.macs is not None:
        # Polarization is at most 1/4, where half of the images open a gate.
        text += f"  open {metrics.open_rate:6.1%}  undecided {4 * metrics.polarization:6.1%}  MACs {metrics.macs:6.1%}"
    return text


def headline(config: TrainConfig, data: ImageData) -> str:
    """Two lines: the network and the data, and the names of the columns."""
    channels, height, width = data.image_shape
    gates = "no gates" if config.gate == "none" else f"{config.gate} gates, {config.estimator}"
    return (
        f"{config.model} ({gates}) on {config.data}: {len(data.train_labels):,} train and "
        f"{len(data.test_labels):,} {config.evaluate_on} images of {height}x{width}x{channels}, "
        f"{data.num_classes} classes, seed {config.seed}\n{_COLUMNS}{'' if config.gate == 'none' else _GATE_COLUMNS}"
    )


class LineProgress(Callback):
    """Plain lines, for logs."""

    def __init__(self) -> None:
        self._config = TrainConfig()
        self._last = 0
        self._done = 0
        self._began = time.monotonic()

    def start(self, config: TrainConfig, data: ImageData) -> None:
        """Print what is trained on what."""
        self._config = config
        print(headline(config, data), flush=True)

    def phase(self, phase: str) -> None:
        """Start to count the epochs of a phase."""
        self._done, self._began = 0, time.monotonic()
        if phase == "finish":
            print(_FINISH, flush=True)
        else:
            self._last = epoch_range(self._config, phase)[1]

    def replay(self, metrics: EpochMetrics) -> None:
        """One line, without the time left: the epoch took none of this process."""
        print(f"{self._place(metrics)}  {describe(metrics)}  (from the checkpoint)", flush=True)
        self._began = time.monotonic()

    def epoch(self, metrics: EpochMetrics) -> None:
        """One line: phase and epoch, its figures, the time left in the phase."""
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._last - metrics.epoch)
        print(f"{self._place(metrics)}  {describe(metrics)}  {_clock(left)} left", flush=True)

    def note(self, text: str) -> None:
        """Print a note."""
        print(f"note: {text}", flush=True)

    def _place(self, metrics: EpochMetrics) -> str:
        return f"{metrics.phase:<7} {metrics.epoch:>{len(str(self._last))}}/{self._last}"


class BarProgress(Callback):
    """A bar per phase, moving with every step.

    Args:
        progress: a `rich.progress.Progress` whose columns read the task's fields `place` and `figures`.
    """

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._config = TrainConfig()
        self._range = 0, 0
        self._task: Any = None
        self._last: EpochMetrics | None = None

    def start(self, config: TrainConfig, data: ImageData) -> None:
        """Print what is trained on what."""
        self._config = config
        self._progress.console.print(headline(config, data), highlight=False)

    def phase(self, phase: str) -> None:
        """Add a bar."""
        self._last = None
        total, figures = None, _FINISH
        if phase != "finish":
            self._range = first, last = epoch_range(self._config, phase)
            total, figures = float(last - first), ""
        self._task = self._progress.add_task(phase, total=total, figures=figures, place="")

    def step(self, report: StepReport) -> None:
        """Move the bar within an epoch."""
        figures = f"loss {report.loss:.3f}  accuracy {report.top1:5.2f} % (training images)"
        if self._last is not None:
            figures = describe(self._last, report.loss)
        self._update(report.epoch - 1 + report.step / report.steps, report.epoch, figures)

    def replay(self, metrics: EpochMetrics) -> None:
        """Move the bar past an epoch of before; the estimate of the time left starts there."""
        self._last = metrics
        self._progress.reset(self._task, completed=float(metrics.epoch - self._range[0]))
        self._update(float(metrics.epoch), metrics.epoch, describe(metrics))

    def epoch(self, metrics: EpochMetrics) -> None:
        """Show the figures of the epoch."""
        self._last = metrics
        self._update(float(metrics.epoch), metrics.epoch, describe(metrics))

    def note(self, text: str) -> None:
        """Print a note above the bars."""
        self._progress.console.print(f"note: {text}", highlight=False, markup=False)

    def _update(self, completed: float, epoch: int, figures: str) -> None:
        first, last = self._range
        self._progress.update(self._task, completed=completed - first, place=f"{epoch}/{last}", figures=figures)


@contextmanager
def _bar() -> Iterator[Callback]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("[bold]{task.description:<7}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[place]:>7}"),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        refresh_per_second=8,
    )
    with progress:
        yield BarProgress(progress)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
