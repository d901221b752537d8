"""What the ledger has of a run's recipe, what is kept with it, and what one failing run takes along."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gatedconv.train.config import TrainConfig, field_specs
from gatedconv.train.run_dir import RunFolder
from gatedconv.train.stopping import StopRequest
from reproduce import rows as reproduce_rows
from reproduce import runner
from reproduce.experiment import Experiment
from reproduce.experiments import find_experiment
from reproduce.ledger import append_row, read_ledger
from reproduce.rows import present_recipes, recipe_of
from reproduce.workplace import Workplace
from tests.reproduce.ledger_rows import row

GATED, FIXED, DENSE = "cpu-r20-c10", "cpu-r20-c10-fixed-at-init", "cpu-r20-c10-dense"
NAIVE = "figure2-c10-r56-naive-layers-50"


def changed(experiment: Experiment, **settings: Any) -> Experiment:
    return replace(experiment, settings={**experiment.settings, **settings})


def test_a_recipe_is_its_settings_and_not_where_or_how_often_it_runs() -> None:
    gated = find_experiment("headline-r56-c10")
    same = {"seed": 3, "device": "cpu", "threads": 2, "max_minutes": 5.0, "latency": False, "data": "npz:x/cifar10.npz"}
    assert recipe_of(changed(gated, **same)) == recipe_of(gated)
    others = [{"lr": 0.2}, {"data": "cifar100"}, {"mac_ramp": (0.2, 0.6)}, {"evaluate_on": "val"}]
    found = [recipe_of(gated), *(recipe_of(changed(gated, **change)) for change in others)]
    assert len(set(found)) == 5 and all(len(each) == 12 for each in found)


def test_a_control_is_of_another_recipe_when_what_it_is_made_from_is(monkeypatch: pytest.MonkeyPatch) -> None:
    control, before = find_experiment("headline-r56-c10-fixed-at-init"), present_recipes()
    gated = changed(find_experiment("headline-r56-c10"), consensus_at=0.9)
    monkeypatch.setattr(reproduce_rows, "find_experiment", lambda name: gated)
    assert recipe_of(control) != before[control.name]


def test_a_field_that_is_younger_than_a_row_leaves_its_recipe_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is the hash of the settings as they would have been written before the field was there."""
    gated, whole = find_experiment("table1-c10-r56-ours"), field_specs()
    before = recipe_of(gated)
    for young in ("teacher_at", "mac_rank", "sync_norm"):
        old = {name: spec for name, spec in whole.items() if name != young}
        monkeypatch.setattr(reproduce_rows, "field_specs", lambda old=old: old)
        assert recipe_of(gated) == before


def test_defaults_that_recipes_rely_on_stay() -> None:
    """A hash leaves defaults out: one that changes would let rows of the old recipe pass for the new one.

    Who changes a default has to take the rows that relied on it out of the ledger, and to write the hash anew here.
    """
    known = json.loads((Path(__file__).parent / "recipe_defaults.json").read_text())
    now = json.loads(json.dumps({name: spec.default for name, spec in field_specs().items()}))
    assert {name: now[name] for name in known if name in now} == known


def test_a_row_of_another_recipe_is_reported_and_stops_only_what_depends_on_it(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    append_row(workplace.ledger, row(GATED, 0, recipe="0123456789ab"))
    append_row(workplace.ledger, row("table6-c10-r110-lambda-0", 0))  # of before rows told their recipe
    before = read_ledger(workplace.ledger)
    keys = [(DENSE, 0), (GATED, 0), (FIXED, 0), ("table6-c10-r110-lambda-0", 0)]
    assert runner.run_experiments(workplace, keys, 1) == runner.FAILED
    told = capsys.readouterr()
    assert "the ledger has this run by another recipe (0123456789ab, now " in told.err
    assert "remove its line from the ledger and move its run folder away" in told.err
    assert f"{FIXED} seed 0: failed: is derived from {GATED}, seed 0, which failed" in told.err
    assert f"2 failed: {GATED} seed 0, {FIXED} seed 0" in told.err.splitlines()[-1]
    assert "table6-c10-r110-lambda-0 seed 0: done already" in told.out
    rows = read_ledger(workplace.ledger)
    assert set(rows) - set(before) == {(DENSE, 0)} and rows[DENSE, 0].recipe == reproduce_rows.recipe_of(
        runner.find_experiment(DENSE)
    )
    with pytest.raises(ValueError, match="by another recipe"):
        runner.run_one(workplace, GATED, 0)


def test_a_run_that_fails_lets_the_others_continue(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, asked = runner.run_one, []

    def run_one(workplace: Workplace, name: str, seed: int) -> int:
        asked.append(name)
        if name == GATED:
            raise RuntimeError("no such luck\nat all")
        return real(workplace, name, seed)

    monkeypatch.setattr(runner, "run_one", run_one)
    assert runner.run_experiments(workplace, [(GATED, 0), (FIXED, 0), (DENSE, 0)], 1) == runner.FAILED
    assert asked == [GATED, DENSE] and set(read_ledger(workplace.ledger)) == {(DENSE, 0)}
    told = capsys.readouterr().err
    assert "Traceback" in told and f"{GATED} seed 0: failed: no such luck at all\n" in told


def test_sigterm_ends_a_run_that_can_resume_and_starts_no_other(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(config: TrainConfig, folder: RunFolder, *, stop: StopRequest, **_: Any) -> None:
        asked.append(config.name)
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested

    monkeypatch.setattr("gatedconv.train.trainer.run", run)
    assert runner.run_experiments(workplace, [(DENSE, 0), (GATED, 0)], 1) == runner.TIME_LIMIT
    assert asked == [DENSE] and read_ledger(workplace.ledger) == {}


def test_what_controls_need_outlives_the_run_folder(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.run_experiments(workplace, [(GATED, 0)], 1) == runner.DONE
    folder, kept = workplace.folder(GATED, 0), workplace.consensus(GATED, 0)
    assert kept.read_bytes() == folder.consensus.read_bytes()
    shutil.rmtree(folder.path)
    assert runner.run_experiments(workplace, [(FIXED, 0)], 1) == runner.DONE
    rows = read_ledger(workplace.ledger)
    assert rows[FIXED, 0].macs == rows[GATED, 0].macs and rows[FIXED, 0].params == rows[GATED, 0].params
    control = workplace.folder(FIXED, 0)
    shutil.rmtree(control.path)
    workplace.ledger.write_text(workplace.ledger.read_text().splitlines()[0] + "\n")
    kept.unlink()
    assert runner.run_experiments(workplace, [(FIXED, 0)], 1) == runner.FAILED
    told = capsys.readouterr().err
    assert f"expected the consensus of {GATED}, seed 0, in {kept}" in told and "restore it, or remove" in told


def test_a_naive_row_without_its_dense_weights_is_refused_by_name(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    append_row(workplace.ledger, row("table1-c10-r56-dense", 0, kind="dense"))
    assert runner.run_experiments(workplace, [(NAIVE, 0)], 1) == runner.FAILED
    weights = workplace.folder("table1-c10-r56-dense", 0).model("dense")
    assert f"expected the weights of table1-c10-r56-dense, seed 0, in {weights}" in capsys.readouterr().err


def test_an_unfinished_run_resumes_where_its_images_are_now(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner.experiment_config
    with monkeypatch.context() as patch:
        patch.setattr(runner, "experiment_config", lambda *given: replace(real(*given), max_minutes=1e-9))
        assert runner.run_experiments(workplace, [(DENSE, 0)], 1) == runner.TIME_LIMIT
    assert workplace.folder(DENSE, 0).holds_checkpoint() and not workplace.folder(DENSE, 0).summary.is_file()
    (old,) = set(workplace.sources.values())
    moved = workplace.runs.parent / "elsewhere" / "blobs.npz"
    moved.parent.mkdir()
    shutil.move(old.removeprefix("npz:"), moved)
    there = replace(workplace, sources={name: f"npz:{moved}" for name in workplace.sources})
    assert runner.run_experiments(there, [(DENSE, 0)], 1) == runner.DONE
    assert workplace.folder(DENSE, 0).read_config().data == f"npz:{moved}"
    other = moved.with_name("others.npz")
    shutil.copy(moved, other)
    shutil.rmtree(workplace.folder(DENSE, 0).path)
    workplace.ledger.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "experiment_config", lambda *given: replace(real(*given), max_minutes=1e-9))
        assert runner.run_experiments(there, [(DENSE, 0)], 1) == runner.TIME_LIMIT
    elsewhere = replace(there, sources={name: f"npz:{other}" for name in workplace.sources})
    with pytest.raises(ValueError, match="a run keeps its recipe: expected data 'npz:.*others.npz'"):
        runner.run_one(elsewhere, DENSE, 0)
