from __future__ import annotations

import errno
import math
import os
import random
from pathlib import Path

import pytest
import torch

from gatedconv._io import write_atomic
from gatedconv.data import TrainBatches
from gatedconv.data.image_data import Augment, make_image_data
from gatedconv.models.resnet import ResNet
from gatedconv.train import EpochMetrics
from gatedconv.train.checkpoint import (
    CheckpointError,
    has_checkpoint,
    load_checkpoint,
    previous_path,
    save_checkpoint,
)
from gatedconv.train.config import make_config
from gatedconv.train.metrics import EpochMeter
from gatedconv.train.presets import preset_settings
from gatedconv.train.state import pack_history, pack_state, unpack_history
from gatedconv.train.step import Stepper
from gatedconv.train.teacher import Teacher


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


def epochs_of(count: int, gates: list[str]) -> list[EpochMetrics]:
    """Metrics without two equal numbers, which is as long as they get."""
    draw = random.Random(0)
    return [
        EpochMetrics(
            "gated", number + 1, *(draw.random() for _ in range(6)), polar_weight=3.0, polarization=draw.random(),
            macs=draw.random(), open_rate=draw.random(), gates_dead=draw.randrange(4000), num_gates=4032,
            train_macs=1e15 * draw.random(), macs_saved=draw.random(), energy_j=1e4 * draw.random(),
            energy_source="NVIDIA H200 (GPU-01234567-89ab-cdef-0123-456789abcdef), CPU package 0, CPU package 1",
            gate_open_rates={name: round(draw.random(), 5) for name in gates},
        )
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "gate", "taught"), [(110, "channel", False), (110, "both", False), (56, "channel", True)]
)
def test_a_checkpoint_at_the_end_of_a_run_is_at_most_16_mb(tmp_path: Path, depth: int, gate: str, taught: bool) -> None:
    config = make_config({**preset_settings(f"best-c100-r{depth}"), "gate": gate, "batch_size": 2, "device": "cpu"})
    assert (config.teacher_at < 1) is taught
    model = ResNet(depth, 100, gate, config.position, shortcut=config.shortcut, input_size=(3, 32, 32))
    stepper = Stepper(model, config, torch.device("cpu"))
    if taught:
        whole = Teacher(config, lambda: ResNet(depth, 100, shortcut=config.shortcut, input_size=(3, 32, 32)))
        whole.begin(stepper)
        whole(torch.randn(2, 3, 32, 32), torch.arange(2), float(config.epochs))
        stepper.parts["teacher"] = whole
    split = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2)
    history = epochs_of(config.epochs, list(EpochMeter(model).gates))
    batches = TrainBatches(make_image_data("two", split, split, Augment()), 2)
    state = pack_state(stepper.parts, batches, config, "gated", history)
    save_checkpoint(tmp_path / "gated.pt", {**state, "guard": stepper.guard.state_dict()})
    assert 13e6 < (tmp_path / "gated.pt").stat().st_size <= 16e6
    assert unpack_history(load_checkpoint(tmp_path / "gated.pt")["history"], "history") == history


def test_a_packed_history_is_exact_and_older_ones_are_read() -> None:
    lines = [*epochs_of(3, ["a", "b"]), EpochMetrics("cut", 4, 1 / 3, 1e-300, 2**0.5, math.inf, 0.1, 5.0)]
    assert unpack_history(pack_history(lines), "history") == lines
    assert unpack_history([line.as_dict() for line in lines], "history") == lines
    assert pack_history(lines).dtype == torch.uint8 and unpack_history(pack_history([]), "history") == []


@pytest.mark.parametrize(
    "found", [torch.zeros(4, dtype=torch.uint8), pack_history([])[:-1], torch.tensor([7, 7]), [{"epoch": 1}], [3]]
)
def test_a_damaged_history_is_one_clear_error(found: object) -> None:
    with pytest.raises(CheckpointError, match=r"^gated\.pt: history: "):
        unpack_history(found, "gated.pt: history")  # type: ignore[arg-type]
