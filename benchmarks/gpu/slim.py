"""Checkpoints of trainings that are done, without what only another step of theirs would need.

A run whose consensus came goes on with what was cut. Its checkpoint before the cut tells the network that was cut, and
its epochs; momentum, and the teacher, whose later state the checkpoint of the cut network has, are most of its bytes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.packs import Piece
from gatedconv.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from gatedconv.train.folder import RunFolder

BEFORE, AFTER = "gated", "cut"


def slimmed(piece: Piece, place: Path, scratch: Path) -> Piece:
    """The checkpoint before a cut, at ``place``, without momentum and teacher; as it is where it cannot be read."""
    try:
        state = load_checkpoint(place)
    except CheckpointError:
        return piece
    state["optimizer"] = {**state["optimizer"], "state": {}}
    if "teacher" in state:
        state["teacher"] = {}
    path = scratch / ".slim.pt"
    save_checkpoint(path, state)
    content = path.read_bytes()
    path.unlink()
    return Piece(piece.name, content, piece.changed)


def made_whole(folder: RunFolder) -> None:
    """Put a teacher back into the checkpoint before the cut: that of the checkpoint after it.

    A checkpoint that is damaged stays as it is: the run says so.
    """
    before, after = folder.checkpoint(BEFORE), folder.checkpoint(AFTER)
    if not (before.is_file() and after.is_file()):
        return
    with suppress(CheckpointError):
        state = load_checkpoint(before)
        if state.get("teacher") == {}:
            state["teacher"] = load_checkpoint(after)["teacher"]
            changed = before.stat().st_mtime
            before.unlink()  # what is slim is nobody's previous checkpoint
            save_checkpoint(before, state)
            os.utime(before, (changed, changed))  # the run is no newer than it was
