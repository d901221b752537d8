"""Training: settings, the loop, checkpoints, and the phases of one run."""

from __future__ import annotations

from gatedconv.train.callbacks import Callback
from gatedconv.train.checkpoint import CheckpointError
from gatedconv.train.config import TrainConfig
from gatedconv.train.loop import NonFiniteLoss
from gatedconv.train.metrics import EpochMetrics, evaluate
from gatedconv.train.presets import PRESETS, preset_settings
from gatedconv.train.run_dir import RunFolder
from gatedconv.train.trainer import run

__all__ = [
    "PRESETS",
    "Callback",
    "CheckpointError",
    "EpochMetrics",
    "NonFiniteLoss",
    "RunFolder",
    "TrainConfig",
    "evaluate",
    "preset_settings",
    "run",
]
