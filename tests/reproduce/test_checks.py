"""What keeps a row from being false: one process at a time, whole runs, the right images, MACs that compare."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gatedconv.data import DataError
from gatedconv.train.config import TrainConfig
from reproduce import checks, runner
from reproduce import rows as reproduce_rows
from reproduce.__main__ import main
from reproduce.ledger import append_row, read_ledger
from reproduce.workplace import Workplace
from tests.image_files import blobs, write_npz
from tests.reproduce.ledger_rows import row

GATED, FIXED, EVEN = "cpu-r20-c10", "cpu-r20-c10-fixed-at-init", "cpu-r20-c10-equal-macs"
DENSE, NAIVE = "table1-c10-r56-dense", "figure2-c10-r56-naive-layers-50"


def in_a_thread(call: Any) -> list[str]:
    """What a call is told in another thread, which to the lock of a folder is like another process."""
    told = []

    def attempt() -> None:
        try:
            call()
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return told


def test_two_at_once_make_one_row(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From before its training to after its row a run is nobody else's; then it is done."""
    pytest.importorskip("fcntl")
    told = []

    def second() -> None:
        if threading.current_thread() is threading.main_thread():  # there is no third
            told.extend(in_a_thread(lambda: runner.run_one(workplace, DENSE, 0)))

    def around(name: str) -> None:
        real = getattr(runner, name)

        def call(*arguments: Any) -> Any:
            second()
            result = real(*arguments)
            second()
            return result

        monkeypatch.setattr(runner, name, call)

    for name in ("known_images", "training_row", "append_row"):
        around(name)
    assert runner.run_one(workplace, DENSE, 0) == runner.DONE
    assert len(told) == 6 and all("seed0: another process trains this run" in each for each in told)
    monkeypatch.setattr("gatedconv.train.trainer.run", None)
    assert runner.run_one(workplace, DENSE, 0) == runner.DONE
    (row,) = read_ledger(workplace.ledger).values()
    assert row.epochs == 2 and len(workplace.epochs(DENSE, 0).read_text().splitlines()) == 2


def test_metrics_that_are_not_those_of_the_run_make_no_row(workplace: Workplace) -> None:
    assert runner.run_one(workplace, GATED, 0) == runner.DONE
    folder, before = workplace.folder(GATED, 0), workplace.ledger.read_bytes()
    metrics, summary = folder.metrics.read_text(), folder.summary.read_text()
    first, second = metrics.splitlines(keepends=True)
    workplace.ledger.unlink()
    for text, told in (("", "0 lines of 0"), (first, "1 lines of 1"), (2 * first + second, "3 lines of 2")):
        folder.metrics.write_text(text)
        with pytest.raises(ValueError, match=f"metrics.jsonl: expected a line for each of 2 epochs, found {told} of"):
            runner.run_one(workplace, GATED, 0)
    folder.metrics.write_text(first)  # as of a run that was interrupted and then frozen
    with pytest.raises(ValueError, match="remove summary.json to resume it from its checkpoint, or move the"):
        runner.run_one(workplace, GATED, 0)
    folder.metrics.write_text(metrics)
    folder.summary.write_text(json.dumps({**json.loads(summary), "epochs": {"gated": 1, "compact": 9}}))
    with pytest.raises(
        ValueError, match="summary.json: epochs: expected {'gated': 1, 'compact': 1}, found .*'compact': 9"
    ):
        runner.run_one(workplace, GATED, 0)
    folder.summary.write_text(summary)
    assert not workplace.ledger.exists() and runner.run_one(workplace, GATED, 0) == runner.DONE
    assert workplace.ledger.read_bytes() == before


def test_a_summary_that_lacks_something_is_named(workplace: Workplace) -> None:
    assert runner.run_one(workplace, GATED, 0) == runner.DONE
    workplace.ledger.unlink()
    path = workplace.folder(GATED, 0).summary
    whole = json.loads(path.read_text())
    for changed, told in (
        ({}, r"epochs: expected .*, found None"),
        ({key: value for key, value in whole.items() if key != "dynamic"}, "missing key 'dynamic'"),
        ({key: value for key, value in whole.items() if key != "wall_s"}, "missing key 'wall_s'"),
        ({**whole, "commit": 5}, "commit: expected str or null, got 5"),
        ({**whole, "open_ratio": 7.0}, "open_ratio: expected at most 1, got 7.0"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"seed0/summary.json: {told}"):
            runner.run_one(workplace, GATED, 0)


def test_the_advice_on_weights_that_are_gone_helps(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.run_experiments(workplace, [(NAIVE, 0)], 1) == runner.DONE
    folder = workplace.folder(DENSE, 0)
    folder.model("dense").unlink()
    workplace.ledger.write_text(workplace.ledger.read_text().splitlines()[0] + "\n")
    assert runner.run_experiments(workplace, [(NAIVE, 0)], 1) == runner.FAILED
    told = capsys.readouterr().err
    assert str(folder.model("dense")) in told
    assert "remove that run's line from the ledger, move its run folder away and run it again" in told
    workplace.ledger.unlink()
    shutil.move(folder.path, workplace.runs / "away")
    assert runner.run_experiments(workplace, [(NAIVE, 0)], 1) == runner.DONE
    assert set(read_ledger(workplace.ledger)) == {(DENSE, 0), (NAIVE, 0)}


def test_a_naive_row_names_the_images_of_its_evaluation(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner.run_one(workplace, DENSE, 0) == runner.DONE
    here = {"versions": {"torch": "9.9"}, "commit": "abc", "device": "a later one", "threads": 1}
    monkeypatch.setattr(reproduce_rows, "provenance", lambda device: here)
    assert runner.run_one(workplace, NAIVE, 0) == runner.DONE
    dense, naive = read_ledger(workplace.ledger).values()
    assert (naive.versions, naive.commit, naive.device) == ({"torch": "9.9"}, "abc", "a later one")
    assert dense.device != naive.device and dense.amp == naive.amp


def test_sigterm_while_a_naive_row_is_made_is_no_failure(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    append_row(workplace.ledger, row(DENSE, 0, kind="dense"))
    monkeypatch.setattr(runner, "naive_row", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        runner.run_experiments(workplace, [(NAIVE, 0)], 1)
    assert left.value.code == runner.TIME_LIMIT and len(read_ledger(workplace.ledger)) == 1


@pytest.mark.parametrize("option", ["--results", "--runs"])
def test_a_folder_that_cannot_be_written_to_is_reported_before_anything_is_trained(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run_one", None)
    (tmp_path / "taken").write_text("kept")
    assert main(["run", GATED, "--seed", "0", option, "taken"]) == 2
    assert "taken: expected a folder that files can be written to (" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "kept"


def holds_no_run(folder: Path) -> bool:
    """Whether a folder has at most the lock that was taken before the checks."""
    return {path.name for path in folder.iterdir()} <= {".lock"}


def test_other_images_get_no_row_under_a_name_that_is_known(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checks.Images((1, 8, 8), 3, 48, 24)
    for change in ({"shape": (3, 8, 8)}, {"classes": 10}, {"train": 50_000}, {"test": 25}, {"val": 15_000}):
        monkeypatch.setattr(checks, "KNOWN_IMAGES", {"cifar10": found._replace(**change)})
        with pytest.raises(DataError, match="blobs.npz: expected cifar10, .*, found 48 train, 0 val and 24 test image"):
            runner.run_one(workplace, DENSE, 0)
    assert holds_no_run(workplace.folder(DENSE, 0).path) and not workplace.ledger.exists()
    monkeypatch.setattr(checks, "KNOWN_IMAGES", {"cifar10": found})
    assert runner.run_one(workplace, DENSE, 0) == runner.DONE
    monkeypatch.setattr(checks, "KNOWN_IMAGES", {"cifar10": found._replace(test=10_000)})
    with pytest.raises(DataError, match="expected cifar10, 48 train, 0 val and 10,000 test images of 1x8x8"):
        runner.run_one(workplace, NAIVE, 0)  # of images that were others when the dense network was trained


def test_a_split_of_its_own_counts_and_is_what_choices_are_made_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = blobs(9, seed=3)
    source = f"npz:{write_npz(tmp_path / 'blobs.npz', val_images=images, val_labels=labels)}"
    known = checks.Images((1, 8, 8), 3, 48, 24, 9)
    monkeypatch.setattr(checks, "KNOWN_IMAGES", {"cifar10-16x16-25k": known})
    on_val = TrainConfig(data=source, evaluate_on="val")
    assert len(checks.known_images("npz:cifar10-16x16-25k.npz", on_val).test_labels) == 9
    assert len(checks.known_images("npz:cifar10-16x16-25k.npz", replace(on_val, evaluate_on="test")).test_labels) == 24


def test_a_control_of_other_macs_than_its_row_is_refused(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is trained where its consensus was edited, and at its row where that of the gated run was."""
    assert runner.run_one(workplace, GATED, 0) == runner.DONE
    kept = workplace.consensus(GATED, 0)
    whole = kept.read_text()
    edited = json.loads(whole)
    name = next(iter(edited["masks"]))
    edited["masks"][name] = "1" + "0" * (len(edited["masks"][name]) - 1)
    kept.write_text(json.dumps(edited))
    with monkeypatch.context() as patch:
        patch.setattr("gatedconv.train.trainer.run", None)
        with pytest.raises(ValueError, match=f"{FIXED}: expected the MACs of {GATED}, seed 0, within 1%: "):
            runner.run_one(workplace, FIXED, 0)
    assert holds_no_run(workplace.folder(FIXED, 0).path)
    kept.write_text(whole)
    assert runner.run_one(workplace, FIXED, 0) == runner.DONE
    gated, fixed = read_ledger(workplace.ledger).values()
    assert fixed.macs == gated.macs
    summary = workplace.folder(FIXED, 0).read_summary()
    rows = {(GATED, 0): replace(gated, macs=gated.macs * 1.02)}
    with pytest.raises(ValueError, match="within 1%"):
        reproduce_rows.training_row(runner.find_experiment(FIXED), 0, workplace.folder(FIXED, 0), summary, rows)
    checks.require_macs(runner.find_experiment(FIXED), 1.009 * gated.macs, gated)
    monkeypatch.setitem(checks.MACS_APART, "equal_macs", 0.03)
    for macs, fits in ((0.98, True), (1.02, True), (0.96, False), (1.04, False)):
        if fits:
            checks.require_macs(runner.find_experiment(EVEN), macs * gated.macs, gated)
        else:
            with pytest.raises(ValueError, match=f"{EVEN}: expected the MACs of {GATED}, .*, within 3%.*even share"):
                checks.require_macs(runner.find_experiment(EVEN), macs * gated.macs, gated)
