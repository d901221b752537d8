"""Training: settings, the loop, checkpoints, and the pipeline of one run."""

from __future__ import annotations

from gatedconv.train.checkpoint import CheckpointError
from gatedconv.train.config import TrainConfig
from gatedconv.train.folder import RunFolder
from gatedconv.train.listener import Listener
from gatedconv.train.loop import NonFiniteLoss, train
from gatedconv.train.metrics import EpochMetrics, evaluate
from gatedconv.train.pipeline import run
from gatedconv.train.presets import PRESETS, preset_settings

__all__ = [
    "PRESETS",
    "CheckpointError",
    "EpochMetrics",
    "Listener",
    "NonFiniteLoss",
    "RunFolder",
    "TrainConfig",
    "evaluate",
    "preset_settings",
    "run",
    "train",
]
