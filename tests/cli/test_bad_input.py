"""Wrong input: exit code 2, one line on stderr naming what, where and what was expected; nothing lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatedconv.train import RunFolder
from gatedconv.train.checkpoint import load_checkpoint
from tests.image_files import write_npz

Call = Callable[..., Any]


def assert_one_line(result: Any, *parts: str) -> None:
    assert result.code == 2, (result.out, result.err)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--preset", "demmo"], ["unknown preset 'demmo'", "demo"]),
        (["--model", "resnet19"], ["model: expected one of resnet20", "'resnet19'"]),
        (["--epochs", "0"], ["epochs: expected at least 1, got 0"]),
        (["--epochs", "many"], ["argument --epochs", "'many'"]),
        (["--batch-size", "1"], ["batch_size: expected at least 2, got 1"]),
        (["--batch-size", "4000"], ["batch_size: expected at most 1347"]),
        (["--lr", "-1"], ["lr: expected above 0.0, got -1.0"]),
        (["--device", "cuda:77"], ["device: expected one that this machine has"]),
        (["--data", "npz:/nowhere/a.npz"], ["/nowhere/a.npz", "expected an .npz file"]),
        (["--data", "imagefolder:/nowhere"], ["/nowhere", "train/"]),
        (["--data", "mnist"], ["unknown source 'mnist'"]),
        (["--config", "/nowhere/a.toml"], ["/nowhere/a.toml", "expected a TOML file"]),
        (["--bogus"], ["unrecognized arguments: --bogus"]),
        (["--resume", "/nowhere"], ["/nowhere", "expected a run folder"]),
        (["--resume", "/nowhere", "--preset", "demo"], ["leave out --preset"]),
    ],
)
def test_train_flags(
    gatedconv: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(gatedconv("train", *flags), *parts)
    assert not list(tmp_path.glob("runs/*/checkpoint/*")) and not list(tmp_path.glob("runs/*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"test_images": None}, ["missing key test_images"]),
        ({"train_images": np.zeros((48, 8, 8), np.float32)}, ["train_images", "uint8", "float32"]),
        ({"test_images": np.zeros((24, 6, 6), np.uint8)}, ["test_images", "8x8", "6x6"]),
        ({"test_labels": np.full(24, 9)}, ["test_labels", "0 to 2", "found 9"]),
    ],
    ids=["key", "dtype", "size", "label"],
)
def test_npz_faults(gatedconv: Call, tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    path = write_npz(tmp_path / "fault.npz", **changes)
    assert_one_line(gatedconv("train", "--data", f"npz:{path}", "--run", tmp_path / "run"), str(path), *parts)
    assert not (tmp_path / "run").exists()


def test_a_config_file_with_a_fault_is_named(gatedconv: Call, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("epochz = 3")
    assert_one_line(gatedconv("train", "--config", tmp_path / "c.toml"), "c.toml", "'epochz'", "epochs")
    (tmp_path / "c.toml").write_text('epochs = "three"')
    assert_one_line(gatedconv("train", "--config", tmp_path / "c.toml"), "epochs: expected a whole number")


@pytest.fixture
def one_epoch(
    gatedconv: Call, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """A run stopped after its first epoch of two."""
    monkeypatch.setattr("gatedconv.train.loop._would_miss", lambda deadline, history: len(history) == 1)
    assert gatedconv("train", *quick, "--run", tmp_path / "run", "--max-minutes", 9).code == 3
    monkeypatch.undo()
    return RunFolder(tmp_path / "run")


def contents(folder: RunFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_run_or_model(gatedconv: Call, one_epoch: RunFolder) -> None:
    before = contents(one_epoch)
    path = str(one_epoch.checkpoint("gated"))
    assert_one_line(
        gatedconv("train", "--resume", one_epoch.path, "--lr", 0.7), path, "expected lr 0.7, found 0.1"
    )
    assert_one_line(
        gatedconv("train", "--resume", one_epoch.path, "--model", "resnet32"),
        path,
        "model 'resnet32', found 'resnet20'",
    )
    assert contents(one_epoch) == before


def test_a_damaged_checkpoint(gatedconv: Call, one_epoch: RunFolder) -> None:
    path = one_epoch.checkpoint("gated")
    path.write_bytes(path.read_bytes()[:-100])
    before = contents(one_epoch)
    assert_one_line(gatedconv("train", "--resume", one_epoch.path), str(path), "damaged checkpoint")
    assert contents(one_epoch) == before


def test_a_folder_that_holds_a_run(gatedconv: Call, quick: list[object], one_epoch: RunFolder) -> None:
    before = contents(one_epoch)
    assert_one_line(gatedconv("train", *quick, "--run", one_epoch.path), str(one_epoch.path), "--resume")
    assert contents(one_epoch) == before


def test_a_full_disk(gatedconv: Call, one_epoch: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = one_epoch.checkpoint("gated").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    result = gatedconv("train", "--resume", one_epoch.path, "--max-minutes", 0)
    monkeypatch.undo()
    assert_one_line(result, "gated.pt", "No space left on device", "is kept")
    assert one_epoch.checkpoint("gated").read_bytes() == before
    assert gatedconv("train", "--resume", one_epoch.path, "--max-minutes", 0).code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_under_the_metrics(gatedconv: Call, one_epoch: RunFolder) -> None:
    one_epoch.metrics.unlink()
    one_epoch.metrics.symlink_to("/dev/full")
    result = gatedconv("train", "--resume", one_epoch.path, "--max-minutes", 0)
    assert_one_line(result, "metrics.jsonl", "No space left on device")
    assert load_checkpoint(one_epoch.checkpoint("gated"))["epoch"] == 1


def test_a_loss_that_turns_nan(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    result = gatedconv("train", *quick, "--lr", "1e30", "--run", tmp_path / "run")
    assert_one_line(result, "gated", "loss became", "expected a finite number")


def test_nan_after_a_good_epoch_keeps_its_checkpoint(
    gatedconv: Call, one_epoch: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = one_epoch.checkpoint("gated").read_bytes()
    monkeypatch.setattr(
        "gatedconv.train.loop.mac_target_loss", lambda model, target: torch.tensor(float("nan"))
    )
    result = gatedconv("train", "--resume", one_epoch.path, "--max-minutes", 0)
    assert_one_line(result, "loss became nan in epoch 2", str(one_epoch.checkpoint("gated")))
    assert one_epoch.checkpoint("gated").read_bytes() == before


def test_commands_on_what_is_not_there(gatedconv: Call, tmp_path: Path, archive: Path) -> None:
    for command in ("eval", "export", "bench", "freeze", "report"):
        assert_one_line(gatedconv(command, tmp_path / "none"), str(tmp_path / "none"), "expected")
        assert_one_line(gatedconv(command, tmp_path), str(tmp_path), "expected")
    for command in ("eval", "export", "bench"):
        assert_one_line(gatedconv(command, archive), str(archive))


def test_commands_on_what_does_not_fit(gatedconv: Call, tmp_path: Path, archive: Path) -> None:
    import gatedconv as package

    model = tmp_path / "net.safetensors"
    package.save(package.models.resnet20(10), model)
    assert_one_line(gatedconv("eval", model), "expected --data SOURCE")
    assert_one_line(
        gatedconv("eval", model, "--data", f"npz:{archive}"), "3 channel(s) and 10 classes", "1 and 3"
    )
    assert_one_line(
        gatedconv("export", model, "--format", "tflite"), "format", "onnx, torch, aoti", "'tflite'"
    )
    assert_one_line(gatedconv("bench", model, "--batch", 0), "batch: expected at least 1, got 0")
    assert_one_line(gatedconv("bench", model, "--rounds", 0), "rounds: expected at least 1, got 0")
    assert_one_line(gatedconv("bench", model, "--size", 0), "size: expected at least 1, got 0")
    assert_one_line(
        gatedconv("bench", model, "--peers", "eager,tflite"), "peers: expected some of", "'tflite'"
    )
    assert_one_line(gatedconv("bench", "resnet19"), "resnet19", "expected a run folder, a model file")
    assert_one_line(gatedconv("bench", archive.with_suffix(".pt2")), "expected a .pt2", "found nothing")
    assert_one_line(gatedconv("bench", model, "--threads", 0), "threads: expected at least 1, got 0")


def test_freeze_of_a_run_without_gates(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gatedconv("train", *quick, "--gate", "none", "--max-minutes", "1e-9", "--run", run).code == 3
    assert_one_line(gatedconv("freeze", run), str(run), "expected a run with gates")


def test_an_unfinished_run_has_no_networks_yet(gatedconv: Call, one_epoch: RunFolder) -> None:
    assert_one_line(gatedconv("eval", one_epoch.path), "expected a finished run")
