"""What a checkpoint holds: everything that the next step depends on, and the metrics so far."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import torch

from gatedconv.data import TrainBatches
from gatedconv.train.checkpoint import CheckpointError, State
from gatedconv.train.config import TrainConfig, require_same_recipe
from gatedconv.train.distributed import ALONE, Ranks
from gatedconv.train.metrics import EpochMetrics
from gatedconv.train.record import NUMBER, require_form

# What `pack_state` writes beside the parts.
_STATE = {
    "phase": str,
    "epoch": int,
    "train_images": int,
    "config": dict,
    "random": {
        "data": torch.Tensor,
        "cpu": torch.Tensor,
        "cuda?": torch.Tensor,
        "begun?": torch.Tensor,
        "position?": int,
        "ranks?": list,
    },
    "history": (torch.Tensor, list),  # a list where it was written before it was packed
    # In the middle of an epoch: what it has shown so far.
    "within?": {
        "seconds": NUMBER, "energy_j": (*NUMBER, type(None)), "executed?": NUMBER, "saved": NUMBER, "meter": dict,
    },
    "guard?": dict,
}  # fmt: skip


def pack_state(
    parts: dict[str, Any],
    batches: TrainBatches,
    config: TrainConfig,
    phase: str,
    history: list[EpochMetrics],
    ranks: Ranks = ALONE,
) -> State:
    """Collect the state of a run; a collective where there are several processes.

    Args:
        parts: what has a `state_dict`, by name: model, optimizer, scaler.
        batches: of the train split; their generator decides order and augmentation.
        config: of the run.
        phase: which training of the run this is.
        history: metrics of every epoch done.
        ranks: the processes of the run; each has random numbers of its own.
    """
    random: dict[str, Any] = {**batches.state(), "cpu": torch.get_rng_state()}
    if batches.labels.is_cuda:
        random["cuda"] = torch.cuda.get_rng_state(batches.labels.device)
    if ranks.world > 1:
        random["ranks"] = ranks.gather({name: random[name] for name in ("cpu", "cuda") if name in random})
    return {
        "phase": phase,
        "epoch": len(history),
        "train_images": len(batches.labels),
        "config": dataclasses.asdict(config),
        "random": random,
        "history": pack_history(history),
        **{name: part.state_dict() for name, part in parts.items()},
    }


def restore_state(
    state: State,
    path: Path,
    parts: dict[str, Any],
    batches: TrainBatches,
    config: TrainConfig,
    phase: str,
    ranks: Ranks = ALONE,
) -> list[EpochMetrics]:
    """Put a run back to where `pack_state` saw it.

    Args:
        state: from `load_checkpoint`.
        path: the file, for errors.
        parts: as in `pack_state`; loaded in place.
        batches: of the train split; their generator is set in place.
        config: of this run; must equal the checkpoint's, but for `FREE_ON_RESUME`.
        phase: which training of the run this is.
        ranks: the processes of the run; random numbers go on where there are as many as there were.

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
    batches.set_state(state["random"])
    _restore_random(state["random"], batches, ranks)
    return unpack_history(state["history"], f"{path}: history")


def pack_history(history: list[EpochMetrics]) -> torch.Tensor:
    """The metrics as compressed JSON, uint8 (bytes,): hundreds of epochs would weigh half a megabyte."""
    text = json.dumps([metrics.as_dict() for metrics in history])
    return torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)


def unpack_history(packed: torch.Tensor | list[Any], where: str) -> list[EpochMetrics]:
    """The metrics that `pack_history` took; a list holds them as they are.

    Raises:
        CheckpointError: they are damaged; begins with `where`.
    """
    lines: Any = packed
    if isinstance(packed, torch.Tensor):
        try:
            lines = json.loads(zlib.decompress(packed.numpy().tobytes()))
        except (zlib.error, ValueError) as error:
            raise CheckpointError(f"{where}: damaged ({error})") from None
    require_form(lines, list, where, CheckpointError)
    return [EpochMetrics.from_dict(line, where, CheckpointError) for line in lines]


def _restore_random(random: dict[str, Any], batches: TrainBatches, ranks: Ranks) -> None:
    every = random.get("ranks", [random])
    if len(every) != ranks.world:
        return  # more or fewer processes than before: each keeps the numbers of its own seed
    mine = every[ranks.rank]
    torch.set_rng_state(mine["cpu"])
    if batches.labels.is_cuda and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], batches.labels.device)


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
