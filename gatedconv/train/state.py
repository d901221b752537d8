"""What a checkpoint holds: everything that the next step depends on, and the metrics so far."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gatedconv.data import TrainBatches
from gatedconv.train.checkpoint import CheckpointError, State
from gatedconv.train.config import FREE_ON_RESUME, TrainConfig, field_specs
from gatedconv.train.metrics import EpochMetrics


def pack_state(
    parts: dict[str, Any],
    batches: TrainBatches,
    config: TrainConfig,
    phase: str,
    history: list[EpochMetrics],
) -> State:
    """Collect the state of a run.

    Args:
        parts: what has a `state_dict`, by name: model, optimizer, scaler.
        batches: of the train split; their generator decides order and augmentation.
        config: of the run.
        phase: which training of the run this is.
        history: metrics of every epoch done.
    """
    random = {"data": batches.generator.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return {
        "phase": phase,
        "epoch": len(history),
        "train_images": len(batches.labels),
        "config": dataclasses.asdict(config),
        "random": random,
        "history": [metrics.as_dict() for metrics in history],
        **{name: part.state_dict() for name, part in parts.items()},
    }


def restore_state(
    state: State,
    path: Path,
    parts: dict[str, Any],
    batches: TrainBatches,
    config: TrainConfig,
    phase: str,
) -> list[EpochMetrics]:
    """Put a run back to where `pack_state` saw it.

    Args:
        state: from `load_checkpoint`.
        path: the file, for errors.
        parts: as in `pack_state`; loaded in place.
        batches: of the train split; their generator is set in place.
        config: of this run; must equal the checkpoint's, but for fields that change no result.
        phase: which training of the run this is.

    Returns:
        The metrics of the epochs done.

    Raises:
        CheckpointError: the checkpoint belongs to another run.
    """
    if state["phase"] != phase:
        raise CheckpointError(
            f"{path}: expected a checkpoint of phase {phase!r}, found one of {state['phase']!r}"
        )
    _require_same_config(state["config"], path, config)
    if state["train_images"] != len(batches.labels):
        raise CheckpointError(
            f"{path}: checkpoint of other data: expected {len(batches.labels)} train images, "
            f"found {state['train_images']}"
        )
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in first[:2])
        raise CheckpointError(f"{path}: checkpoint of another model: {reason}") from None
    batches.generator.set_state(state["random"]["data"])
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return [EpochMetrics(**line) for line in state["history"]]


def _require_same_config(stored: dict[str, Any], path: Path, config: TrainConfig) -> None:
    for name in field_specs():
        mine = getattr(config, name)
        theirs = stored.get(name)
        if name not in FREE_ON_RESUME and theirs != mine:
            raise CheckpointError(
                f"{path}: checkpoint of another run: expected {name} {mine!r}, found {theirs!r}"
            )
