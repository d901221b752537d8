"""One process at a time trains a run; who has died, however it was, holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gatedconv import cli
from gatedconv.train import RunFolder, TrainConfig, pipeline, run
from gatedconv.train.claim import claimed
from gatedconv.train.listener import Listener
from gatedconv.train.metrics import EpochMetrics
from tests.image_files import write_npz

fcntl = pytest.importorskip("fcntl")
HELD = "run: another process trains this run"
# Claims the folder that it is given and forks, as for a process that decodes images; both wait to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from gatedconv.train.claim import claimed
with claimed(Path(sys.argv[1])):
    fork = os.fork()
    if fork:
        print(fork, flush=True)
    time.sleep(60)
"""


def told_to_another(folder: Path) -> str:
    """What another thread, which to the lock is like another process, is told when it claims the folder."""
    told = []

    def claim() -> None:
        try:
            with claimed(folder):
                told.append("")
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=claim)
    thread.start()
    thread.join()
    return told[0]


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that holds the folder, and the number of its fork."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        fork = int(started.stdout.readline())
        try:
            yield started, fork
        finally:
            started.kill()
            os.kill(fork, signal.SIGKILL)


def test_a_process_that_is_killed_holds_nothing_and_neither_does_its_fork(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as (started, fork):
        with pytest.raises(ValueError, match=HELD), claimed(folder):
            pass
        started.kill()
        started.wait()
        os.kill(fork, 0)  # it lives on
        with claimed(folder):
            pass


def test_a_program_that_is_started_meanwhile_holds_nothing(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"):
        command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
        other = subprocess.Popen(command, close_fds=False)
    try:
        assert told_to_another(tmp_path / "run") == "" and other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_who_holds_a_folder_may_claim_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder):
        with claimed(tmp_path / "x" / ".." / "run"):
            pass
        assert HELD in told_to_another(folder)
    assert told_to_another(folder) == ""


def test_nothing_is_left_behind_and_nothing_of_others_goes(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("new", "old", "used"):
        with claimed(tmp_path / name):
            assert list((tmp_path / name).iterdir()) == []
            if name == "used":
                (tmp_path / name / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "old", "used"]


def test_a_fork_that_leaves_the_block_takes_nothing_with_it(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from gatedconv.train.claim import claimed
path = Path(sys.argv[1])
try:
    with claimed(path):
        fork = os.fork()
        if not fork:
            raise KeyboardInterrupt
        _, status = os.waitpid(fork, 0)
        assert path.is_dir()
except KeyboardInterrupt:
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == 7


def test_a_run_is_frozen_by_who_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freezing writes the run's summary anew."""
    monkeypatch.setattr("gatedconv.train.finish.write_exports", lambda *_: [])
    archive, folder = write_npz(tmp_path / "blobs.npz"), RunFolder(tmp_path / "run")
    run(TrainConfig(data=f"npz:{archive}", epochs=1, batch_size=16, latency=False, device="cpu"), folder)
    told, conclude = [], pipeline.conclude

    def concluding(*arguments: Any) -> dict[str, Any]:
        told.append(told_to_another(folder.path))
        return conclude(*arguments)

    monkeypatch.setattr(pipeline, "conclude", concluding)
    assert cli.main(["freeze", str(folder.path)]) == 0
    assert len(told) == 1 and HELD in told[0]


def test_a_folder_that_goes_while_it_is_claimed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who held it may remove it after it was opened: a lock on a folder that is gone keeps nobody out."""
    folder, lock, calls = tmp_path / "run", fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            folder.rmdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(folder):
        assert len(calls) == 2 and HELD in told_to_another(folder)


def test_a_file_system_that_locks_no_folders_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path / "run"):
        assert told_to_another(tmp_path / "run") == ""


def test_a_second_training_of_a_run_is_refused_and_the_first_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatedconv.train.finish.write_exports", lambda *_: [])
    archive, folder = write_npz(tmp_path / "blobs.npz"), RunFolder(tmp_path / "run")
    config = TrainConfig(data=f"npz:{archive}", gate="none", epochs=2, batch_size=16, latency=False, device="cpu")
    told = []

    class Second(Listener):
        def epoch(self, metrics: EpochMetrics) -> None:
            def again() -> None:
                with pytest.raises(ValueError, match=HELD):
                    run(config, folder, resume=True)
                told.append(metrics.epoch)

            thread = threading.Thread(target=again)
            thread.start()
            thread.join()

    summary = run(config, folder, listener=Second())
    assert summary is not None and summary["epochs"] == {"dense": 2} and told == [1, 2]
    assert [line.epoch for line in folder.read_metrics()] == [1, 2]
