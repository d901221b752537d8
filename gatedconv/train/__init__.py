"""Training: one run from images to a compact network.

trainer.py: the phases of a run. build.py, recipe.py, device.py: what a phase trains and where, from config.py. loop.py:
epochs; step.py: a step, with distill.py (teachers), skip_dead.py, recompute.py, cuda_graph_step.py. optimizer.py: the
optimizer and the learning rate. metrics.py, epoch_cost.py, summary.py: what is measured; callbacks.py: who is told of
it. checkpoint.py, run_dir.py, stopping.py: what is written, and when. options.py, presets.py: settings by name.
distributed.py: several ranks.
"""

from __future__ import annotations

from gatedconv.train.callbacks import Callback
from gatedconv.train.checkpoint import CheckpointError
from gatedconv.train.config import TrainConfig
from gatedconv.train.loop import NonFiniteLoss
from gatedconv.train.metrics import EpochMetrics
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
    "preset_settings",
    "run",
]
