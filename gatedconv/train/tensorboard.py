"""Metrics as TensorBoard event files, for those who have TensorBoard installed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

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


class TensorBoard:
    """Writes one point per epoch, under the name of the training.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("tensorboard: not installed: pip install 'gatedconv[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, metrics: EpochMetrics) -> None:
        """Add the metrics of one epoch."""
        for name in _SCALARS:
            self._writer.add_scalar(f"{metrics.phase}/{name}", getattr(metrics, name), metrics.epoch)
