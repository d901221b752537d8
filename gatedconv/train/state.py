"""What a checkpoint holds: everything that the next step depends on, and the metrics so far."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gatedconv.data import TrainBatches
from gatedconv.train.checkpoint import CheckpointError, State
from gatedconv.train.config import TrainConfig, require_same_recipe
from gatedconv.train.metrics import EpochMetrics
from gatedconv.train.record import require_form

# What `pack_state` writes beside the parts.
_STATE = {
    "phase": str,
    "epoch": int,
    "train_images": int,
    "config": dict,
    "random": {"data": torch.Tensor, "cpu": torch.Tensor, "cuda?": torch.Tensor},
    "history": list,
}


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
    if batches.labels.is_cuda:
        random["cuda"] = torch.cuda.get_rng_state(batches.labels.device)
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
        config: of this run; must equal the checkpoint's, but for `FREE_ON_RESUME`.
        phase: which training of the run this is.

    Returns:
        The metrics of the epochs done.

    Raises:
        CheckpointError: the checkpoint is of another form, or belongs to another run.
    """
    require_form(state, _STATE, str(path), CheckpointError)
    if state["phase"] != phase:
        raise CheckpointError(f"{path}: expected a checkpoint of phase {phase!r}, found one of {state['phase']!r}")
    try:
        require_same_recipe(state["config"], config, f"{path}: checkpoint of another run")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if state["train_images"] != len(batches.labels):
        raise CheckpointError(
            f"{path}: checkpoint of other data: expected {len(batches.labels)} train images, "
            f"found {state['train_images']}"
        )
    for name, part in parts.items():
        restore_part(state, path, name, part)
    batches.generator.set_state(state["random"]["data"])
    torch.set_rng_state(state["random"]["cpu"])
    if batches.labels.is_cuda and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], batches.labels.device)
    return [EpochMetrics.from_dict(line, f"{path}: history", CheckpointError) for line in state["history"]]


def restore_part(state: State, path: Path, name: str, part: Any) -> None:
    """Load one part of a checkpoint in place: model, optimizer or scaler.

    Args:
        state: from `load_checkpoint`.
        path: the file, for errors.
        name: of the part.
        part: what takes its state.

    Raises:
        CheckpointError: the checkpoint lacks the part, or it is that of another model.
    """
    require_form(state, {name: dict}, str(path), CheckpointError)
    try:
        part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in first[:2])
        raise CheckpointError(f"{path}: checkpoint of another model: {reason}") from None
