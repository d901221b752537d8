"""Every row of the experiment table runs: two epochs on a few images of 8x8, all else as in the row.

The headline, ResNet-20 and two rows of ResNet-110 keep their depth. Other networks have one block a stage, that the
whole table takes minutes; that each row's own network can be built is shown in test_experiments. Rows that differ in
what is shrunk alone run once. A few that show every kind of row and every choice are quick, the others slow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from gatedconv import models
from gatedconv.models import BUILDERS
from gatedconv.models.resnet import ResNet
from gatedconv.train.run_dir import RunFolder
from reproduce import rows as reproduce_rows
from reproduce import runner
from reproduce.experiment import Experiment
from reproduce.experiments import all_experiments
from reproduce.ledger import LedgerRow, read_ledger
from reproduce.workplace import Workplace
from tests.image_files import write_npz
from tests.reproduce.conftest import stand_ins

EXPERIMENTS = all_experiments()
EPOCHS, BATCH = 2, 16
DEEP = ("table6-c10-r110-lambda-1", "table3-c10-r110-2fc-middle")  # layer gates, and channel gates that flatten
SHALLOW = "resnet32"  # stands for the shallow network in configs, which know no other names
DATA = ("cifar10", "cifar100", "cifar10-16x16-25k")


def shrunk(experiment: Experiment) -> Experiment:
    """The row with as little to compute as can be, every share of its run as it was."""
    whole = reproduce_rows.recipe_settings(experiment)
    warmup = EPOCHS * whole.get("warmup_epochs", 0.0) / whole["epochs"]
    tiny = {"epochs": EPOCHS, "warmup_epochs": warmup, "batch_size": BATCH, "device": "cpu", "threads": 1}
    deep = "headline" in experiment.shown or whole["model"] == "resnet20" or experiment.name in DEEP
    model = whole["model"] if deep else SHALLOW
    return replace(experiment, settings={**experiment.settings, **tiny, "model": model, "latency": False})


def identity(experiment: Experiment) -> tuple[Any, ...]:
    """Equal for rows whose shrunk runs are the same."""
    settings = reproduce_rows.recipe_settings(shrunk(experiment))
    kept = sorted((key, str(value)) for key, value in settings.items() if key not in ("name", "data", "seed"))
    needs = tuple(identity(EXPERIMENTS[name]) for name in experiment.sources)
    return experiment.kind, experiment.share, needs, tuple(kept)


def distinct() -> dict[str, list[str]]:
    """{first row of its kind: all rows that it stands for}, what others are made from before them."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, experiment in EXPERIMENTS.items():
        found.setdefault(identity(experiment), []).append(name)
    return {names[0]: names for names in found.values()}


ROWS = distinct()


def choices(name: str) -> set[tuple[str, object]]:
    """What a row is, and what its settings choose, numbers aside."""
    settings = reproduce_rows.recipe_settings(shrunk(EXPERIMENTS[name])) | {"kind": EXPERIMENTS[name].kind}
    del settings["name"], settings["data"]
    return {(key, value if isinstance(value, (str, bool)) else None) for key, value in settings.items()}


def telling() -> set[str]:
    """Few rows that have, between them, each choice that a row of a network of at most 20 layers has."""
    found = {name: choices(name) for name in ROWS}
    found = {name: own for name, own in found.items() if {("model", "resnet20"), ("model", SHALLOW)} & own}
    left, chosen = set().union(*found.values()), set()
    while left:
        best = max(found, key=lambda name: len(found[name] & left))
        left -= found[best]
        chosen.add(best)
    return chosen


TELLING = telling()


def shallow(*arguments: Any, **options: Any) -> ResNet:
    return ResNet(8, *arguments, **options)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """One ledger for all rows, as controls need what they are made from."""
    folder = tmp_path_factory.mktemp("rows")
    archive = write_npz(folder / "blobs.npz")
    tiny = {name: shrunk(each) for name, each in EXPERIMENTS.items()}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for module in (runner, reproduce_rows):
            patch.setattr(module, "find_experiment", tiny.__getitem__)
        for name in (SHALLOW, "resnet8"):  # what it is asked for by, and what it is saved as
            patch.setattr(models, name, shallow, raising=False)
            patch.setitem(BUILDERS, name, shallow)
        patch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])
        stand_ins(patch)
        yield Workplace(folder / "runs", folder / "results", {name: f"npz:{archive}" for name in DATA})
    torch.set_num_threads(threads)


def test_every_row_is_run_or_represents_one_that_is() -> None:
    assert sorted(name for names in ROWS.values() for name in names) == sorted(EXPERIMENTS)
    assert len(ROWS) > 80
    for first, names in ROWS.items():
        own, other = EXPERIMENTS[first], [EXPERIMENTS[name] for name in names]
        assert {(each.kind, each.share) for each in other} == {(own.kind, own.share)}


@pytest.mark.parametrize(
    "name", [name if name in TELLING else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_a_row_of_the_table_runs(workplace: Workplace, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert runner.run_experiments(workplace, [(name, 0)], 1) == runner.DONE, capfd.readouterr().err
    rows, experiment = read_ledger(workplace.ledger), EXPERIMENTS[name]
    row = rows[name, 0]
    assert row.kind == experiment.kind and row.epochs == (EPOCHS if experiment.trains else 0)
    assert 0 < row.macs <= row.macs_dense * 1.0001
    assert row.energy_j is None or row.energy_j > 0
    assert row.macs_conv is not None and row.macs_conv_dense is not None
    assert 0.8 * row.macs < row.macs_conv < row.macs and row.macs_conv_dense < row.macs_dense
    if experiment.needs:
        check_what_it_is_made_from(row, rows[experiment.needs, 0])
    if experiment.trains:
        config = workplace.folder(name, 0).read_config()
        own = reproduce_rows.recipe_settings(experiment)
        for field in ("gate", "position", "estimator", "hidden", "pool", "schedule", "milestones", "polar_schedule"):
            assert getattr(config, field) == own.get(field, getattr(config, field))
        lines = workplace.epochs(name, 0).read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    if experiment.kind == "gated":
        assert row.agreement is not None and row.top1_dynamic is not None and row.macs_dynamic is not None
        kept = workplace.consensus(name, 0)
        assert kept.read_bytes() == RunFolder(workplace.runs / f"{name}-seed0").consensus.read_bytes()
        assert kept.stat().st_size < 16384
    assert str(workplace.runs) not in workplace.ledger.read_text()


def check_what_it_is_made_from(row: LedgerRow, whole: LedgerRow) -> None:
    assert row.macs_dense == whole.macs_dense and row.macs_conv_dense == whole.macs_conv_dense
    experiment = EXPERIMENTS[row.experiment]
    if row.kind == "naive_dropout":
        assert row.macs == row.macs_dense and row.pruning_rate == experiment.share / 100
    elif row.kind == "naive_layer":
        assert row.macs < row.macs_dense and row.pruning_rate is not None and 0 < row.pruning_rate < 1
    elif row.kind == "fixed_at_init":
        assert (row.macs, row.params) == (whole.macs, whole.params)
    else:
        assert row.kind in ("equal_macs", "taught_before") and row.macs <= whole.macs * 1.15
