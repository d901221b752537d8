"""Whatever kills a run, and wherever: it continues and ends the same."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gatedconv.cli import main
from gatedconv.train import Callback, RunFolder, run
from gatedconv.train.checkpoint import previous_path
from tests.train.kills import RECIPES, differences, killed_round, outcome, run_in_child, small_config

pytestmark = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs fork")


LATE = list(RECIPES)[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbs, and its seconds."""
    from tests.image_files import write_npz

    folder = tmp_path_factory.mktemp("straight")
    write_npz(folder / "blobs.npz")
    began = time.monotonic()
    assert run_in_child(small_config(folder / "blobs.npz"), folder / "run")
    return folder, time.monotonic() - began


@pytest.mark.slow
def test_runs_killed_at_random_end_the_same(straight: tuple[Path, float]) -> None:
    """Three of the rounds; fifty are in benchmarks/results/scaling-kills.json."""
    folder, seconds = straight
    draw, kills = random.Random(5), 0
    for number in range(3):
        counts = killed_round(small_config(folder / "blobs.npz"), folder / f"killed{number}", seconds, draw)
        kills += sum(counts.values())
        assert not differences(outcome(folder / "run"), outcome(folder / f"killed{number}"))
    assert kills > 0


@pytest.mark.slow
def test_runs_that_compact_and_distill_end_the_same_too(straight: tuple[Path, float]) -> None:
    """Killed in the training of the gates, just after the consensus, and in the training of what is left."""
    folder, _ = straight
    config = small_config(folder / "blobs.npz", **RECIPES[LATE])
    assert run_in_child(config, folder / "late")
    expected = outcome(folder / "late")
    assert [line["phase"] for line in expected["lines"]] == ["gated", "gated", "compact", "compact"]
    assert bool(expected["states"]["gated"]["pruner"]["pruned"].any())  # else there was nothing to get wrong
    for number, call in enumerate((14, 17, 9)):  # each time so many more
        assert not run_in_child(config, folder / "late killed", kill_in_call=call), number
    assert run_in_child(config, folder / "late killed")
    assert not differences(expected, outcome(folder / "late killed"))


def test_differences_are_found(straight: tuple[Path, float]) -> None:
    folder, _ = straight
    left, right = outcome(folder / "run"), outcome(folder / "run")
    assert not differences(left, right)
    right["states"]["gated"]["model"]["conv1.weight"][0, 0, 0, 0] += 1e-7
    right["lines"][1]["train_loss"] += 1e-12
    assert differences(left, right) == ["/states/gated/model/conv1.weight", "/lines/1/train_loss"]


def test_a_killed_write_leaves_nothing_behind_once_resumed(straight: tuple[Path, float]) -> None:
    folder, _ = straight
    config, target = small_config(folder / "blobs.npz"), folder / "leftover"
    assert not run_in_child(config, target, kill_in_call=5)  # before the flush of a checkpoint
    assert list(target.glob("checkpoint/.*.tmp"))
    assert run_in_child(config, target)
    assert not list(target.glob("**/.*.tmp"))
    assert not differences(outcome(folder / "run"), outcome(target))


def test_a_full_disk_and_a_damaged_checkpoint_cost_nothing_but_time(
    straight: tuple[Path, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = straight
    config, target = small_config(folder / "blobs.npz"), RunFolder(folder / "full")
    real, calls = os.fsync, []

    def filling(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 11:  # the file of a checkpoint; folders are flushed in between
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", filling)
    with pytest.raises(OSError, match=r"gated\.pt: could not be written \(No space left on device\)"):
        run(config, target)
    monkeypatch.undo()
    newest = target.checkpoint("gated")
    assert newest.is_file() and previous_path(newest).is_file()
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run_in_child(config, target.path)
    assert not differences(outcome(folder / "run"), outcome(target.path))


def test_sigterm_writes_a_checkpoint_and_leaves_with_code_3(straight: tuple[Path, float], tmp_path: Path) -> None:
    folder, _ = straight
    target = RunFolder(tmp_path / "run")
    flags = ["--data", f"npz:{folder / 'blobs.npz'}", "--epochs", "3000", "--batch-size", "16", "--mac-weight", "4"]
    command = [sys.executable, "-m", "gatedconv", "train", "--run", str(target.path), *flags, "--no-latency"]
    process = subprocess.Popen([*command, "--threads", "1", "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not target.metrics.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 3, out
    assert "a stop was requested; resume with: gatedconv train --resume" in out
    assert target.holds_checkpoint() and not target.summary.is_file()


@pytest.mark.parametrize(("epoch", "step"), [(2, 1), (3, 3)], ids=["middle", "last step"])
def test_a_run_that_is_stopped_resumes_to_the_same_end(straight: tuple[Path, float], epoch: int, step: int) -> None:
    from gatedconv.train.callbacks import StepReport
    from gatedconv.train.stopping import StopRequest

    folder, _ = straight
    stop, target = StopRequest(), RunFolder(folder / f"stopped{epoch}")

    class Asking(Callback):
        def step(self, report: StepReport) -> None:
            if (report.epoch, report.step) == (epoch, step):
                stop.requested = True

    config = small_config(folder / "blobs.npz", checkpoint_minutes=0.0)
    assert run(config, target, callback=Asking(), stop=stop) is None
    assert len(target.read_metrics()) == (1 if step == 1 else 3) and not target.summary.is_file()
    assert run_in_child(config, target.path)
    assert not differences(outcome(folder / "run"), outcome(target.path))


def test_a_damaged_run_that_cannot_resume_raises(
    straight: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = straight
    config, target = small_config(folder / "blobs.npz"), RunFolder(folder / "lost")
    assert not run_in_child(config, target.path, kill_in_call=14)
    for path in (target.checkpoint("gated"), previous_path(target.checkpoint("gated"))):
        path.write_bytes(b"gone")
    assert main(["train", "--resume", str(target.path)]) == 2
    assert "gated.pt: expected a gatedconv checkpoint, found a damaged or different file" in capsys.readouterr().err
