from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch

from gatedconv._io import write_atomic
from gatedconv.data import TrainBatches
from gatedconv.data.image_data import Augment, make_image_data
from gatedconv.models.resnet import ResNet
from gatedconv.train import EpochMetrics, TrainConfig
from gatedconv.train.checkpoint import (
    CheckpointError,
    has_checkpoint,
    load_checkpoint,
    pack_state,
    previous_path,
    restore_state,
    save_checkpoint,
)
from gatedconv.train.step import Stepper


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


@pytest.mark.parametrize("damage", ["short", "flip", "empty", "text"])
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "gated.pt"
    saved(path, 1, 2)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "short": content[:middle],
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


def packed(path: Path) -> tuple[Stepper, TrainBatches, TrainConfig]:
    """A checkpoint of a network that has made a step."""
    config = TrainConfig(batch_size=2, device="cpu")
    stepper = Stepper(ResNet(8, 3, "layer", input_size=(1, 8, 8)), config, torch.device("cpu"))
    split = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2)
    batches = TrainBatches(make_image_data("two", split, split, Augment()), 2)
    line = EpochMetrics("gated", 1, 1 / 3, 1e-300, 2**0.5, math.inf, 0.1, 5.0, 0.5, gate_open_rates={"a": 0.1})
    parts = stepper.parts | {"guard": stepper.guard}
    save_checkpoint(path, pack_state(parts, batches, config, "gated", [line]))
    return stepper, batches, config


def restored(path: Path) -> list[EpochMetrics]:
    stepper, batches, config = packed(path.with_name("other.pt"))
    parts = stepper.parts | {"guard": stepper.guard}
    return restore_state(load_checkpoint(path), path, parts, batches, config, "gated")


def test_metrics_are_plain_and_exact(tmp_path: Path) -> None:
    path = tmp_path / "gated.pt"
    packed(path)
    (line,) = restored(path)
    assert (line.lr, line.train_loss, line.test_loss, line.gate_open_rates) == (1 / 3, 1e-300, math.inf, {"a": 0.1})
    assert load_checkpoint(path)["history"] == [line.as_dict()]


@pytest.mark.parametrize("found", [torch.zeros(4), [{"epoch": 1}], [3]])
def test_a_damaged_history_is_one_clear_error(tmp_path: Path, found: object) -> None:
    path = tmp_path / "gated.pt"
    packed(path)
    save_checkpoint(path, load_checkpoint(path) | {"history": found})
    with pytest.raises(CheckpointError, match=r"gated\.pt: history: "):
        restored(path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gated.pt"
    packed(path)
    path.write_bytes(path.read_bytes().replace(b"checkpoint 2", b"checkpoint 1", 1))
    with pytest.raises(CheckpointError, match=r"gated\.pt: checkpoint of another version of gatedconv"):
        load_checkpoint(path)
