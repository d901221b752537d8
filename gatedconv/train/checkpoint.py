"""Checkpoints: what the next step depends on, in files that survive a crash; and the file of the consensus.

A checkpoint is written completely or not at all, the previous one is kept, and a checksum detects damage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedconv._io import NUMBER, require_schema, write_atomic
from gatedconv.data import TrainBatches
from gatedconv.gating import Consensus
from gatedconv.train.config import TrainConfig, require_same_recipe
from gatedconv.train.distributed import SINGLE, Ranks
from gatedconv.train.metrics import EpochMetrics

State = dict[str, Any]
_NAME = b"gatedconv checkpoint "
_MAGIC = _NAME + b"2\n"
_DIGEST_SIZE = hashlib.sha256().digest_size
# What `pack_state` writes in addition to the parts.
_STATE = {
    "phase": str,
    "epoch": int,
    "train_images": int,
    "labels?": str,
    "config": dict,
    "random": {
        "data": torch.Tensor,
        "cpu": torch.Tensor,
        "cuda?": torch.Tensor,
        "begun": torch.Tensor,
        "position": int,
        "passes": int,
        "ranks?": list,
    },
    "history": list,
    # In the middle of an epoch: its sums so far.
    "within?": {
        "seconds": NUMBER,
        "core_seconds": NUMBER,
        "energy_j": (*NUMBER, type(None)),
        "executed": NUMBER,
        "saved": NUMBER,
        "meter": dict,
    },
    "guard": dict,
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run; the message is for the user."""


def previous_path(path: Path) -> Path:
    """The file of the checkpoint before the newest one."""
    return path.with_suffix(".previous" + path.suffix)


def has_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint, intact or not, at `path`."""
    return any(candidate.is_file() for candidate in (path, previous_path(path)))


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` to `path`; the checkpoint there becomes the previous one, if it is intact.

    At every moment at least one intact checkpoint is on the disk: the new file is complete before the old one is
    renamed, and the old one is never removed.

    Args:
        path: of the newest checkpoint, ending in .pt.
        state: tensors, numbers, strings, lists and dicts only.

    Raises:
        OSError: the disk is full or not writable; the last intact checkpoint is unchanged.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    content = _MAGIC + hashlib.sha256(payload).digest() + payload
    write_atomic(path, content, previous=previous_path(path) if _is_intact(path) else None)


def load_checkpoint(path: Path, note: Callable[[str], object] = warnings.warn) -> State:
    """Read the newest intact checkpoint: the one at `path`, else the previous one.

    Tensors are loaded to the CPU; no code in the file is run.

    Args:
        path: of the newest checkpoint.
        note: called with a message when the previous checkpoint is read.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    present = [candidate for candidate in (path, previous_path(path)) if candidate.is_file()]
    if not present:
        raise CheckpointError(f"{path}: expected a checkpoint, found none")
    faults = []
    for candidate in present:
        try:
            state = _read(candidate)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            if candidate != path:
                fault = "; ".join(faults) or f"{path}: no such file"
                note(f"{fault}; the previous one is read instead: {candidate}")
            return state
    raise CheckpointError("; ".join(faults))


def _is_intact(path: Path) -> bool:
    try:
        _payload(path)
    except (CheckpointError, OSError):
        return False
    return True


def _payload(path: Path) -> bytes:
    content = path.read_bytes()
    header = len(_MAGIC) + _DIGEST_SIZE
    payload = content[header:]
    if content.startswith(_NAME) and not content.startswith(_MAGIC):
        raise CheckpointError(f"{path}: checkpoint of another version of gatedconv")
    if not content.startswith(_MAGIC):
        raise CheckpointError(f"{path}: expected a gatedconv checkpoint, found a damaged or different file")
    if hashlib.sha256(payload).digest() != content[len(_MAGIC) : header]:
        raise CheckpointError(f"{path}: damaged checkpoint: its checksum does not match its content")
    return payload


def _read(path: Path) -> State:
    payload = _payload(path)
    try:
        state: State = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path}: unreadable checkpoint ({error})") from None
    return state


# ---- the state of a phase


def pack_state(
    parts: dict[str, Any],
    batches: TrainBatches,
    config: TrainConfig,
    phase: str,
    history: list[EpochMetrics],
    ranks: Ranks = SINGLE,
) -> State:
    """Collect the state of a phase; a collective where there are several processes.

    Args:
        parts: what has a `state_dict`, by name: model, optimizer, scaler, guard, ...
        batches: of the train split; their generator decides order and augmentation.
        config: of the run.
        phase: of the run.
        history: metrics of every epoch done.
        ranks: the processes of the run; each has its own random numbers.
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
        "labels": _digest(batches.labels),
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
    ranks: Ranks = SINGLE,
) -> list[EpochMetrics]:
    """Restore in place what `pack_state` collected, with its arguments; `path` is the file that `state` is from.

    The config must be the checkpoint's, except for `FREE_ON_RESUME`; random numbers are restored where there are as
    many processes as before.

    Returns:
        The metrics of the epochs done.

    Raises:
        CheckpointError: the checkpoint has another schema, or belongs to another run.
    """
    require_schema(state, _STATE, str(path), CheckpointError)
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
    if state.get("labels", found := _digest(batches.labels)) != found:
        raise CheckpointError(f"{path}: checkpoint of other data: its training labels differ")
    for name, part in parts.items():
        restore_part(state, path, name, part)
    batches.set_state(state["random"])
    _restore_random(state["random"], batches, ranks)
    return [EpochMetrics.from_dict(line, f"{path}: history", CheckpointError) for line in state["history"]]


def _digest(labels: Tensor) -> str:
    return hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest()


def restore_part(state: State, path: Path, name: str, part: Any) -> None:
    """Load one part of a checkpoint in place: model, optimizer, scaler, ...

    Args:
        state: from `load_checkpoint`.
        path: the file, for errors.
        name: of the part.
        part: what loads the state.

    Raises:
        CheckpointError: the checkpoint lacks the part, or it is that of another model.
    """
    require_schema(state, {name: dict}, str(path), CheckpointError)
    try:
        part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in first[:2])
        raise CheckpointError(f"{path}: checkpoint of another model: {reason}") from None


def _restore_random(random: dict[str, Any], batches: TrainBatches, ranks: Ranks) -> None:
    every = random.get("ranks", [random])
    if len(every) != ranks.world:
        return  # another number of processes: each keeps the random numbers of its own seed
    mine = every[ranks.rank]
    torch.set_rng_state(mine["cpu"])
    if batches.labels.is_cuda and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], batches.labels.device)


# ---- the consensus

Figures = dict[str, Any]
_CONSENSUS = {
    "masks": dict,
    "figures": {"agreement?": (*NUMBER, type(None)), "gate_agreement?": dict},
    "open_rates?": dict,
}


def write_consensus(path: Path, consensus: Consensus, figures: Figures) -> None:
    """Write the consensus and its figures, such as the agreement, as JSON; atomic."""
    kept = {
        "masks": {name: "".join(str(int(open_)) for open_ in mask.tolist()) for name, mask in consensus.masks.items()},
        # 9 digits round-trip float32.
        "open_rates": {
            name: " ".join(f"{rate:.9g}" for rate in rates.tolist()) for name, rates in consensus.open_rates.items()
        },
        "figures": figures,
    }
    write_atomic(path, (json.dumps(kept, indent=1) + "\n").encode())


def read_consensus(path: Path) -> tuple[Consensus, Figures]:
    """Read what `write_consensus` wrote, tensors on the CPU; a file without open rates has none.

    Raises:
        ValueError: the file is missing, damaged or has another schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected the consensus of a run, found nothing there") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the consensus of a run, could not read it ({error})") from None
    require_schema(found, _CONSENSUS, str(path))
    masks, figures = {}, found["figures"]
    for name, text in found["masks"].items():
        if not isinstance(text, str) or not text or set(text) - {"0", "1"}:
            raise ValueError(f"{path}: masks: {name}: expected zeros and ones, found {text!r}")
        masks[name] = torch.tensor([digit == "1" for digit in text])
    rates = {name: _rates(text, f"{path}: open_rates: {name}") for name, text in found.get("open_rates", {}).items()}
    sizes = {name: rate.shape for name, rate in rates.items()}
    if rates and sizes != {name: mask.shape for name, mask in masks.items()}:
        raise ValueError(f"{path}: open_rates: expected a number for each of the masks, found others")
    return Consensus(masks, figures.get("agreement"), figures.get("gate_agreement", {}), rates), figures


def _rates(text: Any, where: str) -> Tensor:
    try:
        return torch.tensor([float(rate) for rate in text.split()])
    except (AttributeError, ValueError):
        raise ValueError(f"{where}: expected numbers, found {text!r}") from None
