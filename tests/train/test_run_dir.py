"""One process at a time trains a run; who has died, however it was, holds nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from gatedconv import cli
from gatedconv.train import Callback, EpochMetrics, RunFolder, TrainConfig, run
from gatedconv.train.trainer import Trainer
from tests.image_files import write_npz

HELD = "run: another process trains this run"


def told_to_another(folder: Path) -> str:
    """The error of another thread, which to the lock is like another process, when it locks the folder."""
    told = []

    def claim() -> None:
        try:
            with RunFolder(folder).locked():
                told.append("")
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=claim)
    thread.start()
    thread.join()
    return told[0]


def test_who_holds_a_folder_may_claim_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunFolder(folder).locked():
        with RunFolder(tmp_path / "x" / ".." / "run").locked():
            pass
        assert HELD in told_to_another(folder)
    assert told_to_another(folder) == ""


def test_a_run_is_frozen_by_who_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freezing writes the run's summary anew."""
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])
    archive, folder = write_npz(tmp_path / "blobs.npz"), RunFolder(tmp_path / "run")
    run(TrainConfig(data=f"npz:{archive}", epochs=1, batch_size=16, latency=False, device="cpu"), folder)
    told, finish = [], Trainer.finish

    def finishing(*arguments: Any) -> dict[str, Any]:
        told.append(told_to_another(folder.path))
        return finish(*arguments)

    monkeypatch.setattr(Trainer, "finish", finishing)
    assert cli.main(["freeze", str(folder.path)]) == 0
    assert len(told) == 1 and HELD in told[0]


def test_a_second_training_of_a_run_is_refused_and_the_first_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])
    archive, folder = write_npz(tmp_path / "blobs.npz"), RunFolder(tmp_path / "run")
    config = TrainConfig(data=f"npz:{archive}", gate="none", epochs=2, batch_size=16, latency=False, device="cpu")
    told = []

    class Second(Callback):
        def epoch(self, metrics: EpochMetrics) -> None:
            def again() -> None:
                with pytest.raises(ValueError, match=HELD):
                    run(config, folder, resume=True)
                told.append(metrics.epoch)

            thread = threading.Thread(target=again)
            thread.start()
            thread.join()

    summary = run(config, folder, callback=Second())
    assert summary is not None and summary["epochs"] == {"dense": 2} and told == [1, 2]
    assert [line.epoch for line in folder.read_metrics()] == [1, 2]
