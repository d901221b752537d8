"""What a run tells while it goes on. Nothing here prints: the command line brings a listener that does."""

from __future__ import annotations

from gatedconv.data import ImageData
from gatedconv.train.config import TrainConfig
from gatedconv.train.loop import StepReport
from gatedconv.train.metrics import EpochMetrics


class Listener:
    """Hears everything and does nothing; override what is of interest."""

    def start(self, config: TrainConfig, data: ImageData) -> None:
        """The images are loaded."""

    def phase(self, phase: str) -> None:
        """A training ("dense" or "gated") or a later step ("finish") begins."""

    def step(self, report: StepReport) -> None:
        """Some steps of an epoch are done."""

    def epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done and its checkpoint written; a resumed run tells its earlier epochs again."""

    def note(self, text: str) -> None:
        """Something that a person should know."""
