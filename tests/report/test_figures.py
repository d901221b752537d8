"""The paper's figures from a ledger: which are drawn, and that their marks stand where the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gatedconv.report import figures, plots
from gatedconv.report.experiments import all_experiments, find_experiment
from gatedconv.report.ledger import LedgerRow
from tests.report.ledger_rows import row

DENSE, OURS, NAIVE = "table1-c10-r56-dense", "table1-c10-r56-ours", "figure2-c10-r56-naive-layers-50"


def sweep() -> dict[tuple[str, int], LedgerRow]:
    """Dense 93 and 94, ours 92 and 93 at 40 % of the parameters pruned and half of the MACs, naive layers at 30."""
    gone: dict[str, Any] = {"pruning_rate": None, "macs": 1.2e8}
    found = [row(DENSE, seed, kind="dense", top1_last=93.0 + seed, **gone) for seed in (0, 1)]
    found += [row(OURS, seed, top1_last=92.0 + seed) for seed in (0, 1)]
    found.append(row(NAIVE, 0, kind="naive_layer", top1_last=30.0, pruning_rate=0.5))
    found.append(row("table1-c10-r56-ours-swapped", 0, top1_last=10.0))
    return {each.key: each for each in found}


def write_epochs(folder: Path, name: str, seed: int = 0) -> None:
    lines = [
        {"epoch": epoch, "phase": "gated", "test_top1": 60.0 + epoch, "polar_weight": 0.0 if epoch < 3 else 2.0,
         "gate_open_rates": {"layer1.0.layer_gate": 1.0, "layer1.1.layer_gate": 0.0}}
        for epoch in range(1, 6)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-seed{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{file name: matplotlib figure} of the sweep."""
    kept: dict[str, Any] = {}
    real = plots._save

    def save(figure: Any, path: Path, plt: Any) -> Path:
        kept[path.name] = figure
        return real(figure, path, plt)

    monkeypatch.setattr(plots, "_save", save)
    write_epochs(tmp_path / "epochs", "table4-c10-r110-layer")
    paths = figures.draw_figures(sweep(), tmp_path / "epochs", tmp_path / "images")
    assert [path.name for path in paths] == ["figure2.png", "figure3.png", "figure6-table4-c10-r110-layer.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 800 and np.asarray(image.convert("L")).std() > 5
    return kept


def points(axes: Any) -> set[tuple[float, float]]:
    return {(round(float(x), 3), round(float(y), 3)) for dots in axes.collections for x, y in dots.get_offsets()}


def marks(axes: Any) -> set[tuple[float, float]]:
    return {
        (round(float(line.get_xdata()[0]), 3), round(float(line.get_ydata()[0]), 3))
        for line in axes.lines
        if line.get_marker() == "o"
    }


def test_figure_2_has_every_run_where_it_belongs(drawn: dict[str, Any]) -> None:
    left, right = drawn["figure2.png"].axes
    runs = {(0.0, 93.0), (0.0, 94.0), (40.0, 92.0), (40.0, 93.0), (50.0, 30.0)}
    assert points(left) == runs  # and none of the swapped reading
    assert points(right) == {(0.0, 93.0), (0.0, 94.0), (50.0, 92.0), (50.0, 93.0), (50.0, 30.0)}
    assert {text.get_text() for text in left.get_legend().get_texts()} == {"dense", "ours", "naive layers"}


def test_figure_3_has_both_panels_beside_the_literature(drawn: dict[str, Any]) -> None:
    left, right = drawn["figure3.png"].axes
    assert marks(left) == {(0.0, 93.5), (40.0, 92.5)}
    lines = {round(float(line.get_ydata()[0]), 2) for line in left.lines if line.get_marker() != "o"}
    assert {92.42, 91.90, 92.26, 91.80, 91.31} <= lines
    assert marks(right) == {(50.0, 1.0)}
    # As the paper's table has it; AMC and Importance are printed with other drops than their accuracies give.
    assert points(right) >= {(41.81, 1.01), (50.0, 0.9), (39.9, 1.7), (52.6, 1.33), (27.6, 1.73), (20.3, 0.78)}
    assert "AMC, Importance" in {text.get_text() for text in left.texts}


def test_figure_6_is_drawn_of_every_run_that_has_epochs(tmp_path: Path) -> None:
    names = [each.name for each in all_experiments().values() if "figure6" in each.shown]
    for name in names:
        write_epochs(tmp_path / "epochs", name)
    paths = figures.draw_figures({}, tmp_path / "epochs", tmp_path)
    assert [path.name for path in paths] == [f"figure6-{name}.png" for name in names]


def test_the_bench_is_drawn_from_all_its_seeds(tmp_path: Path) -> None:
    name = "cpu-r20-c10-dense"
    assert "cpu" in find_experiment(name).shown
    rows = {(name, seed): row(name, seed, kind="dense") for seed in (0, 1)}
    for seed in (0, 1):
        write_epochs(tmp_path / "epochs", name, seed)
    assert [path.name for path in figures.draw_figures(rows, tmp_path / "epochs", tmp_path)] == ["cpu-bench.png"]


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert figures.draw_figures({}, tmp_path / "epochs", tmp_path) == []


def test_damaged_epochs_are_told_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"epoch": 1, "phase": "gated", "test_top1": 50.0}\n{"epoch"\n')
    with pytest.raises(ValueError, match="a.jsonl: line 2 is damaged"):
        figures.read_epochs(path)
    path.write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match="a.jsonl: line 1: expected the metrics of an epoch"):
        figures.read_epochs(path)
