"""Checkpoints that survive a crash: written whole or not at all, the one before kept, damage noticed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gatedconv._io import write_atomic

State = dict[str, Any]
_MAGIC = b"gatedconv checkpoint 1\n"
_DIGEST_SIZE = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run; the message is for the user."""


def previous_path(path: Path) -> Path:
    """Where the checkpoint before the newest one is kept."""
    return path.with_suffix(".previous" + path.suffix)


@contextlib.contextmanager
def naming_file(path: Path, rest: str = "") -> Iterator[None]:
    """Errors of writing name the file and the reason; `rest` ends the message."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error}){rest}") from None


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` to `path`; the checkpoint that stood there becomes the previous one, if it is whole.

    At every moment at least one whole checkpoint lies on the disk: the new file is complete before the
    old one is renamed, and the old one is renamed, never removed.

    Args:
        path: of the newest checkpoint, ending in .pt.
        state: tensors, numbers, strings, lists and dicts only.

    Raises:
        OSError: the disk is full or not writable; the last good checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    content = _MAGIC + hashlib.sha256(payload).digest() + payload
    write_atomic(path, content, previous=previous_path(path) if _is_whole(path) else None)


def load_checkpoint(path: Path, note: Callable[[str], object] = warnings.warn) -> State:
    """Read the newest whole checkpoint: the one at `path`, else the one before it.

    Tensors come to the CPU; no code in the file is run.

    Args:
        path: of the newest checkpoint.
        note: told in words when the one before it had to stand in.

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
                note(f"{fault}; the one before it is read instead: {candidate}")
            return state
    raise CheckpointError("; ".join(faults))


def has_checkpoint(path: Path) -> bool:
    """Whether any checkpoint, whole or not, lies at `path`."""
    return any(candidate.is_file() for candidate in (path, previous_path(path)))


def _is_whole(path: Path) -> bool:
    try:
        _payload(path)
    except (CheckpointError, OSError):
        return False
    return True


def _payload(path: Path) -> bytes:
    content = path.read_bytes()
    header = len(_MAGIC) + _DIGEST_SIZE
    payload = content[header:]
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
