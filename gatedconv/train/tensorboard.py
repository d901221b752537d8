"""Metrics as TensorBoard event files, for those who have TensorBoard installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType

from gatedconv.train.checkpoint import naming_file
from gatedconv.train.metrics import EpochMetrics

_SCALARS = (
    "lr",
    "train_loss",
    "train_top1",
    "test_loss",
    "test_top1",
    "polar_weight",
    "polarization",
    "macs",
    "open_rate",
    "gates_dead",
    "gates_saturated",
)


def require_tensorboard() -> None:
    """Raise ImportError, saying what to install, if TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("tensorboard: not installed: pip install 'gatedconv[tensorboard]'")


class TensorBoard:
    """Writes one point per epoch, under the name of the training.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the disk is full or not writable.
    """

    def __init__(self, folder: Path) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with naming_file(folder):
            self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming_file(self._folder):
            self._writer.close()

    def write(self, metrics: EpochMetrics) -> None:
        """Add the metrics of one epoch."""
        with naming_file(self._folder):
            for name in _SCALARS:
                self._writer.add_scalar(f"{metrics.phase}/{name}", getattr(metrics, name), metrics.epoch)
