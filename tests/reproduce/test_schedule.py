"""Plans: their order, and how far each run is."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduce.__main__ import main
from reproduce.experiments import all_experiments
from reproduce.ledger import append_row
from reproduce.schedule import PLANS, planned, status
from reproduce.workplace import Workplace
from tests.reproduce.ledger_rows import row


def test_a_plan_begins_with_what_an_hour_buys_and_has_each_run_once() -> None:
    keys = list(planned("cpu"))
    assert keys[:2] == [("fast-c10-dense", 0), ("fast-c10", 0)]
    first = {part: keys.index(key) for key, part in reversed(planned("cpu").items())}
    assert first["a"] < first["b"] < first["c"] < first["d"] < first["e"]
    known = all_experiments()
    for name in PLANS:
        assert all(seed in known[each].seeds for each, seed in planned(name))
    of_plan = {each for each, _ in keys}
    assert of_plan == {name for name in known if name.startswith(("fast", "epochs", "small"))}
    assert not of_plan & {each for each, _ in planned("gpu")}
    with pytest.raises(ValueError, match="plan: expected one of cpu, gpu, got 'tpu'"):
        planned("tpu")


def test_what_a_run_is_made_from_is_in_the_plan_too() -> None:
    keys = planned("cpu")
    for name, seed in keys:
        assert all((source, seed) in keys for source in all_experiments()[name].sources), name


def test_the_list_of_a_plan_says_how_far_each_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_row(tmp_path / "ledger.jsonl", row("fast-c10-dense", 0, kind="dense", core_minutes=18.2))
    assert main(["list", "--plan", "cpu", "--results", str(tmp_path), "--runs", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "fast-c10-dense", "0", *"done: 93.50 % in 18 core-minutes".split()] in lines
    assert ["a", "fast-c10", "0", "not", "begun"] in lines


def test_a_run_that_is_under_way_counts_its_epochs(tmp_path: Path) -> None:
    from gatedconv.train.config import TrainConfig

    workplace = Workplace(tmp_path, tmp_path, {})
    folder = workplace.folder("fast-c10", 0)
    folder.begin(TrainConfig(epochs=7), resume=False)
    folder.checkpoint("gated").parent.mkdir(exist_ok=True)
    folder.checkpoint("gated").write_bytes(b"")
    assert status(workplace, ("fast-c10", 0), {}) == "0 of 7 epochs done"


def test_names_and_seeds_choose_from_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fast-c10-dense", "fast-c10"):
        append_row(tmp_path / "ledger.jsonl", row(name, 0, kind="dense" if "dense" in name else "gated"))
    common = ["--results", str(tmp_path), "--runs", str(tmp_path)]
    assert main(["run", "--plan", "cpu", "fast-c10-dense", "fast-c10", "--seed", "0", *common]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{n} seed 0: done already" for n in ("fast-c10-dense", "fast-c10")]
    assert main(["run", *common]) == 2
    assert "run: expected names of experiments, or --plan" in capsys.readouterr().err
