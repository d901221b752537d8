from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from gatedconv.deploy.atomic import write_atomic
from gatedconv.train.checkpoint import (
    CheckpointError,
    has_checkpoint,
    load_checkpoint,
    previous_path,
    save_checkpoint,
)


def saved(path: Path, *epochs: int) -> None:
    for epoch in epochs:
        save_checkpoint(path, {"epoch": epoch, "weight": torch.full((300,), float(epoch))})


def test_newest_is_read_and_the_one_before_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gated.pt"
    assert not has_checkpoint(path)
    saved(path, 1, 2, 3)
    assert has_checkpoint(path)
    state = load_checkpoint(path)
    assert state["epoch"] == 3 and torch.equal(state["weight"], torch.full((300,), 3.0))
    path.unlink()
    with pytest.warns(UserWarning, match=r"gated\.pt: no such file; .* instead: .*gated\.previous\.pt"):
        assert load_checkpoint(path)["epoch"] == 2
    assert sorted(os.listdir(path.parent)) == ["gated.previous.pt"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "gated.pt"
    saved(path, 1, 2)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:middle],
            "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "empty": b"",
            "text": b"not a checkpoint",
        }[damage]
    )
    notes: list[str] = []
    assert load_checkpoint(path, notes.append)["epoch"] == 1
    assert len(notes) == 1 and "gated.pt: " in notes[0] and "gated.previous.pt" in notes[0]
    previous_path(path).unlink()
    with pytest.raises(CheckpointError, match=r"gated\.pt: .*damaged"):
        load_checkpoint(path)


def test_a_damaged_checkpoint_never_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "gated.pt"
    saved(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-5])
    saved(path, 3)
    path.unlink()
    assert load_checkpoint(path, lambda text: None)["epoch"] == 1


def test_no_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: expected a checkpoint, found none"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "gated.pt"
    saved(path, 1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"gated\.pt: could not be written \(No space left on device\)"):
        saved(path, 2)
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["gated.pt"]


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "gated.pt"
    save_checkpoint(path, {"model": torch.nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="unreadable checkpoint"):
        load_checkpoint(path)


def test_write_atomic_replaces(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.txt", b"one")
    write_atomic(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_bytes() == b"two" and os.listdir(tmp_path) == ["a.txt"]
