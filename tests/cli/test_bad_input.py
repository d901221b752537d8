"""Wrong input: exit code 2, one line on stderr naming what, where and what was expected; nothing lost."""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatedconv.cli import _out_of_memory
from gatedconv.train import RunFolder
from gatedconv.train.checkpoint import load_checkpoint, save_checkpoint
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
        (["--seed", "99999999999999999999"], ["seed: expected", "at most 9223372036854775807"]),
        (["--threads", "100000000000"], ["threads: expected at least 0 and at most 4096, got 100000000000"]),
        (["--hidden", "100000000000"], ["hidden: expected at least 0 and at most 4096, got 100000000000"]),
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
    assert not list(tmp_path.iterdir())


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
def one_epoch(gatedconv: Call, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run stopped after its first epoch of two."""
    monkeypatch.setattr("gatedconv.train.loop.Training._deadline_passed", lambda self: len(self.history) == 1)
    assert gatedconv("train", *quick, "--run", tmp_path / "run", "--max-minutes", 9).code == 3
    monkeypatch.undo()
    return RunFolder(tmp_path / "run")


def contents(folder: RunFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_run_or_model(gatedconv: Call, one_epoch: RunFolder) -> None:
    before = contents(one_epoch)
    path = str(one_epoch.config)
    assert_one_line(gatedconv("train", "--resume", one_epoch.path, "--lr", 0.7), path, "expected lr 0.7, found 0.1")
    assert_one_line(
        gatedconv("train", "--resume", one_epoch.path, "--model", "resnet32"),
        path,
        "model 'resnet32', found 'resnet20'",
    )
    assert contents(one_epoch) == before

    path = str(one_epoch.checkpoint("gated"))
    settings = one_epoch.config.read_text()
    one_epoch.config.write_text(settings.replace('"resnet20"', '"resnet32"'))
    assert_one_line(gatedconv("train", "--resume", one_epoch.path), path, "model 'resnet32', found 'resnet20'")
    assert_one_line(gatedconv("freeze", one_epoch.path), path, "checkpoint of another model", "layer1.3")


@pytest.mark.parametrize("key", ["phase", "model", "random", "history", "optimizer"])
def test_a_checkpoint_that_lacks_a_key(gatedconv: Call, one_epoch: RunFolder, key: str) -> None:
    path = one_epoch.checkpoint("gated")
    state = load_checkpoint(path)
    del state[key]
    save_checkpoint(path, state)
    assert_one_line(gatedconv("train", "--resume", one_epoch.path), str(path), f"missing key '{key}'")
    if key == "model":
        assert_one_line(gatedconv("freeze", one_epoch.path), str(path), "missing key 'model'")


def test_a_resume_before_the_first_checkpoint_keeps_the_recipe(
    gatedconv: Call, quick: list[object], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    assert gatedconv("train", *quick, "--run", folder.path, "--max-minutes", "1e-9").code == 3
    before = contents(folder)
    assert_one_line(gatedconv("train", "--resume", folder.path, "--lr", 0.7), "config.toml", "lr 0.7, found 0.1")
    assert contents(folder) == before
    assert gatedconv("train", "--resume", folder.path, "--max-minutes", "2e-9", "--name", "mine").code == 3
    stored = folder.read_config()
    assert (stored.max_minutes, stored.name, stored.lr) == (2e-9, "mine", 0.1)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--batch-size", 400], ["batch_size: expected at most 48"]),
        (["--pad", 100000], ["pad: expected less than 8, the side of the images, got 100000"]),
        (["--tensorboard"], ["gatedconv[tensorboard]"]),
        (["--seed", 2**63], ["seed: expected at least 0 and at most 9223372036854775807"]),
    ],
)
def test_a_refused_run_claims_no_folder(
    gatedconv: Call,
    quick: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[object],
    parts: list[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: name != "tensorboard" and find_spec(name, *rest) or None
    )
    assert_one_line(gatedconv("train", *quick, *flags, "--run", tmp_path / "run"), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"frozen": {"top1": 1}}', ["frozen: missing key 'macs'"]),
        (b'{"frozen": {"top1": 1, "macs": 2, "params": 3}}', ["missing key 'agreement'"]),
        (b'{"dense": {"top1": "1", "macs": 2, "params": 3}}', ["dense: top1: expected int or float, found str"]),
        (b"[1]", ["expected dict, found list"]),
        (b"\xff", ["expected UTF-8 text"]),
    ],
)
def test_a_damaged_summary(gatedconv: Call, one_epoch: RunFolder, content: bytes, parts: list[str]) -> None:
    one_epoch.summary.write_bytes(content)
    result = gatedconv("report", one_epoch.path, "--no-plots")
    assert_one_line(result, str(one_epoch.summary), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"3\n", ["line 2: expected dict, found int"]),
        (b'{"phase": "gated"}\n', ["line 2: missing key 'epoch'"]),
        (b"\xff\n", ["expected UTF-8 text"]),
    ],
)
def test_damaged_metrics(gatedconv: Call, one_epoch: RunFolder, content: bytes, parts: list[str]) -> None:
    one_epoch.metrics.write_bytes(one_epoch.metrics.read_bytes() + content)
    assert_one_line(gatedconv("report", one_epoch.path), str(one_epoch.metrics), *parts)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 TiB\nframe #0"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line(
    gatedconv: Call, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def greedy(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("gatedconv.train.trainer.load_images", greedy)
    assert_one_line(gatedconv("train", *quick, "--run", tmp_path / "run"), "out of memory: ", "7 TiB")


def test_pytorchs_own_allocator_errors_are_known() -> None:
    for size in ((2**46,), (2**62, 2**10)):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(size)
        assert _out_of_memory(caught.value), caught.value
    assert not _out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))


def test_an_internal_error_is_no_user_error(
    gatedconv: Call, quick: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatedconv.train.trainer.load_images", lambda config: [][0])
    with pytest.raises(IndexError):
        gatedconv("train", *quick, "--run", tmp_path / "run")
    monkeypatch.setattr("gatedconv.train.trainer.load_images", lambda config: len(3))
    assert_one_line(
        gatedconv("train", *quick, "--run", tmp_path / "run"), "'int' has no len()", "GATEDCONV_TRACEBACK=1"
    )
    monkeypatch.setenv("GATEDCONV_TRACEBACK", "1")
    with pytest.raises(TypeError):
        gatedconv("train", *quick, "--run", tmp_path / "run")


def test_an_interruption_reports_what_is_kept(
    gatedconv: Call, quick: list[object], one_epoch: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gatedconv.train.trainer.Training.epochs", interrupted)
    early = gatedconv("train", *quick, "--run", one_epoch.path.with_name("early"))
    assert early.code == 130 and "interrupted before an epoch was finished" in early.err
    later = gatedconv("train", "--resume", one_epoch.path)
    assert later.code == 130 and f"epoch with: gatedconv train --resume {one_epoch.path}" in later.err
    monkeypatch.setattr("gatedconv.cli.eval.saved_networks", interrupted)
    other = gatedconv("eval", one_epoch.path)
    assert (other.code, other.err) == (130, "gatedconv eval: interrupted\n")


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
        if "gated.pt" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = one_epoch.checkpoint("gated").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    result = gatedconv("train", "--resume", one_epoch.path)
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


def test_a_disk_that_fills_under_the_plots(
    gatedconv: Call, one_epoch: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert_one_line(gatedconv("report", one_epoch.path), str(one_epoch.plots), "could not be written (No space left")
    trained = gatedconv("train", "--resume", one_epoch.path)
    assert trained.code == 0 and f"plots not drawn: {one_epoch.plots}: could not be written" in trained.out


def test_a_loss_that_turns_nan(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    result = gatedconv("train", *quick, "--lr", "1e30", "--run", tmp_path / "run")
    assert_one_line(result, "gated", "loss or gradient not finite", "in epoch 1", "a lower lr")


def test_nan_after_a_good_epoch_keeps_its_checkpoint(
    gatedconv: Call, one_epoch: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = one_epoch.checkpoint("gated").read_bytes()
    monkeypatch.setattr("gatedconv.train.recipe.mac_target_loss", lambda model, target: torch.tensor(float("nan")))
    monkeypatch.setattr("gatedconv.train.step.MOST_IN_A_ROW", 2)  # an epoch has three steps
    result = gatedconv("train", "--resume", one_epoch.path, "--max-minutes", 0)
    assert_one_line(result, "not finite in 3 steps in a row", "epoch 2", str(one_epoch.checkpoint("gated")))
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
    assert_one_line(gatedconv("eval", model, "--data", f"npz:{archive}"), "3 channel(s) and 10 classes", "1 and 3")
    assert_one_line(gatedconv("export", model, "--format", "tflite"), "format", "onnx, torch, aoti, plan", "'tflite'")
    assert_one_line(gatedconv("bench", model, "--batch", 0), "batch: expected at least 1, got 0")
    assert_one_line(gatedconv("bench", model, "--batch", 10**30), "batch: expected at most 1000000, got 1000")
    assert_one_line(gatedconv("bench", model, "--rounds", 0), "rounds: expected at least 1, got 0")
    assert_one_line(gatedconv("bench", model, "--size", 0), "size: expected at least 1, got 0")
    assert_one_line(gatedconv("bench", model, "--peers", "eager,tflite"), "peers: expected some of", "'tflite'")
    assert_one_line(gatedconv("bench", "n1 i96 o24 h56 k1 open5O"), "'n1 i96 o24 h56 k1 open5O'", "got 'open5O'")
    assert_one_line(gatedconv("bench", "n1 i9 o9 h5 k1", "--batch", 2), "batch: not for a single convolution")
    assert_one_line(gatedconv("bench", "n1 i9 o9 h5 k1", "--peers", "none"), "peers: not for a single convolution")
    for options, told in (
        (["--energy"], "energy: not for --footprint, got --energy"),
        (["--reduced"], "reduced: not for --footprint"),
        (["--peers", "mnn"], "peers: not for --footprint"),
        (["--all-settings"], "all-settings: not for --footprint"),
        (["--batch", 8, 32], "batch: expected one for --footprint, got 2"),
    ):
        assert_one_line(gatedconv("bench", model, "--footprint", *options), told)
    assert_one_line(gatedconv("bench", "resnet19"), "resnet19", "expected a run folder, a model file")
    assert_one_line(gatedconv("bench", archive.with_suffix(".pt2")), "expected a .pt2", "found nothing")
    program = torch.export.export(torch.nn.Conv2d(1, 2, 3), (torch.zeros(1, 1, 8, 8),))
    torch.export.save(program, tmp_path / "fixed.pt2")
    larger = gatedconv("bench", tmp_path / "fixed.pt2", "--size", 64, "--batch", 1, "--rounds", 1)
    assert_one_line(larger, "fixed: the network does not accept (1, 1, 64, 64)")
    gated = tmp_path / "gated.safetensors"
    package.save(package.models.resnet20(10, "layer"), gated)
    assert_one_line(
        gatedconv("bench", gated, "--rounds", 1, "--batch", 1, "--peers", "none"), "gated: nothing could be run"
    )
    assert_one_line(gatedconv("bench", model, "--threads", 0), "threads: expected at least 1, got 0")
    assert_one_line(gatedconv("bench", model, "--threads", 10**11), "threads: expected at most 4096")


def test_freeze_of_a_run_without_gates(gatedconv: Call, quick: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gatedconv("train", *quick, "--gate", "none", "--max-minutes", "1e-9", "--run", run).code == 3
    assert_one_line(gatedconv("freeze", run), str(run), "expected a run with gates")


def test_an_unfinished_run_has_no_networks_yet(gatedconv: Call, one_epoch: RunFolder) -> None:
    assert_one_line(gatedconv("eval", one_epoch.path), "expected a finished run")
