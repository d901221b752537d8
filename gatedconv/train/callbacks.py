"""Reports of a run while it trains. Nothing here prints: the command line passes a callback that does."""

from __future__ import annotations

from dataclasses import dataclass

from gatedconv.data import ImageData
from gatedconv.train.config import TrainConfig
from gatedconv.train.metrics import EpochMetrics


@dataclass(frozen=True)
class StepReport:
    """Progress within an epoch: the step, counted from 1, and the means of the epoch so far.

    Attributes:
        phase: "dense", "gated" or "compact".
        epoch: counted from 1.
        step: steps done.
        steps: steps of an epoch.
        loss: mean loss.
        top1: percent, of the training batches.
    """

    phase: str
    epoch: int
    step: int
    steps: int
    loss: float
    top1: float


class Callback:
    """Base class of callbacks; every method is a no-op."""

    def start(self, config: TrainConfig, data: ImageData) -> None:
        """The images are loaded."""

    def phase(self, phase: str) -> None:
        """A phase begins: "dense", "gated", "compact" (training continues with the compact network) or "finish"."""

    def step(self, report: StepReport) -> None:
        """Some steps of an epoch are done."""

    def replay(self, metrics: EpochMetrics) -> None:
        """A resumed run has read the metrics of an earlier epoch from its checkpoint."""

    def epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done and its checkpoint written."""

    def note(self, text: str) -> None:
        """A message for the user."""
