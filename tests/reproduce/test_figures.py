"""The paper's figures from a ledger: which are drawn, and that their marks are where the rows put them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gatedconv.report import plots
from reproduce import figures
from reproduce.experiments import all_experiments, find_experiment
from reproduce.ledger import LedgerRow
from tests.reproduce.ledger_rows import row

DENSE, OURS, NAIVE = "table1-c10-r56-dense", "table1-c10-r56-ours", "figure2-c10-r56-naive-layers-50"


def sweep() -> dict[tuple[str, int], LedgerRow]:
    """Dense 93 and 94, ours 92 and 93 at 40 % of the parameters pruned and half of the MACs, naive layers at 30.

    By the other reading dense 90, ours 88 at 20 % and at a quarter, and 86 at 60 % and at three.
    """
    gone: dict[str, Any] = {"pruning_rate": None, "macs": 1.2e8}
    found = [row(DENSE, seed, kind="dense", top1_last=93.0 + seed, **gone) for seed in (0, 1)]
    found += [row(OURS, seed, top1_last=92.0 + seed) for seed in (0, 1)]
    found.append(row(NAIVE, 0, kind="naive_layer", top1_last=30.0, pruning_rate=0.5))
    found.append(row(f"{DENSE}-swapped", 0, kind="dense", top1_last=90.0, **gone))
    found.append(row(f"{OURS}-swapped", 0, top1_last=88.0, pruning_rate=0.2, macs=9e7))
    found.append(row("figure2-c10-r56-act-070-swapped", 0, top1_last=86.0, pruning_rate=0.6, macs=3e7))
    found.append(row("table4-c10-r110-layer", 0))
    return {each.key: each for each in found}


GATED: dict[str, Any] = {
    **{"phase": "gated", "epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_top1": 40.0, "test_loss": 1.5},
    **{"test_top1": 50.0, "polar_weight": 1.0, "seconds": 1.0, "gate_open_rates": {"a": 1.0, "b": 0.5}},
}


def write_epochs(folder: Path, name: str, seed: int = 0) -> None:
    lines = [
        GATED
        | {
            "epoch": epoch,
            "test_top1": 60.0 + epoch,
            "polar_weight": 0.0 if epoch < 3 else 2.0,
            "gate_open_rates": {"layer1.0.layer_gate": 1.0, "layer1.1.layer_gate": 0.0},
        }
        for epoch in range(1, 6)
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-seed{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{file name: matplotlib figure} of the sweep."""
    kept: dict[str, Any] = {}
    real = plots.save_figure

    def save(figure: Any, path: Path, plt: Any) -> Path:
        kept[path.name] = figure
        return real(figure, path, plt)

    monkeypatch.setattr(plots, "save_figure", save)
    write_epochs(tmp_path / "epochs", "table4-c10-r110-layer")
    paths = figures.draw_figures(sweep(), tmp_path / "epochs", tmp_path / "images")
    names = ["figure2.png", "figure3.png", "figure6-table4-c10-r110-layer.png", "overview.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 800 and np.asarray(image.convert("L")).std() > 5
    return kept


def points(axes: Any) -> set[tuple[float, float]]:
    return {(round(float(x), 3), round(float(y), 3)) for dots in axes.collections for x, y in dots.get_offsets()}


def marks(axes: Any) -> set[tuple[float, float]]:
    return {
        (round(float(x), 3), round(float(y), 3))
        for line in axes.lines
        if line.get_marker() in ("o", "s", "^")
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }


def legend(axes: Any) -> set[str]:
    return {text.get_text() for text in axes.get_legend().get_texts()}


def test_the_overview_has_every_experiment_and_its_distance_to_dense(drawn: dict[str, Any]) -> None:
    left, right = drawn["overview.png"].axes
    ours = {(120.0, 93.5), (60.0, 92.5), (120.0, 90.0), (90.0, 88.0), (30.0, 86.0), (60.0, 93.5)}
    assert marks(left) == ours  # naive baselines are not trained
    named = points(left) - {(0.0, 0.0)}  # of the spread's bars
    assert {y for _, y in named} == {top1 for others in figures.OTHERS.values() for top1, _ in others.values()}
    labels = [label.get_text() for label in right.get_yticklabels()]
    found = {labels[round(y)]: x for x, y in marks(right)}
    assert found == {
        "ours, λ_act 0.5 (50 %)": -1.0,
        "ours, λ_act 0.5, swapped (75 %)": -2.0,
        "ours, λ_act 0.7, swapped (25 %)": -4.0,
    }
    assert {text.get_text() for text in left.figure.legends[0].get_texts()} == {
        "dense",
        "the paper's method",
        "resnet56",
    }


def test_figure_2_has_every_run_where_it_belongs(drawn: dict[str, Any]) -> None:
    left, right = drawn["figure2.png"].axes
    swapped = {(0.0, 90.0), (20.0, 88.0), (60.0, 86.0)}
    assert points(left) == {(0.0, 93.0), (0.0, 94.0), (40.0, 92.0), (40.0, 93.0), (50.0, 30.0)} | swapped
    swapped = {(0.0, 90.0), (25.0, 88.0), (75.0, 86.0)}
    assert points(right) == {(0.0, 93.0), (0.0, 94.0), (50.0, 92.0), (50.0, 93.0), (50.0, 30.0)} | swapped
    assert legend(left) == {"dense", "ours", "naive layers", "dense, swapped", "ours, swapped"}
    for dots in left.collections:  # filled as printed, hollow as swapped, in the same colors
        assert len(dots.get_facecolor()) == (0 if dots.get_label().endswith("swapped") else 1)
    colors = {dots.get_label(): tuple(dots.get_edgecolor()[0]) for dots in left.collections}
    assert colors["ours"] == colors["ours, swapped"] != colors["dense"] == colors["dense, swapped"]


def test_figure_3_has_both_panels_and_the_literature(drawn: dict[str, Any]) -> None:
    left, right = drawn["figure3.png"].axes
    assert marks(left) == {(0.0, 93.5), (40.0, 92.5), (0.0, 90.0), (20.0, 88.0), (60.0, 86.0)}
    assert legend(left) == {"dense", "ours", "dense, swapped", "ours, swapped"}
    lines = {round(float(line.get_ydata()[0]), 2) for line in left.lines if line.get_marker() != "o"}
    assert {92.42, 91.90, 92.26, 91.80, 91.31} <= lines
    assert marks(right) == {(50.0, 1.0), (25.0, 2.0), (75.0, 4.0)}  # each from the dense runs of its own reading
    (spread,) = {container.get_label(): container for container in right.containers}["ours"].lines[2]
    assert np.ptp(spread.get_segments()[0][:, 1]) == pytest.approx(2 * 0.5**0.5)
    # As the paper's table has it; AMC and Importance are printed with other drops than their accuracies give.
    assert points(right) >= {(41.81, 1.01), (50.0, 0.9), (39.9, 1.7), (52.6, 1.33), (27.6, 1.73), (20.3, 0.78)}
    assert "AMC, Importance" in {text.get_text() for text in left.texts}


def test_figure_6_is_drawn_of_every_run_that_has_a_row_and_epochs(tmp_path: Path) -> None:
    names = [each.name for each in all_experiments().values() if "figure6" in each.shown]
    for name in names:
        write_epochs(tmp_path / "epochs", name)
    (tmp_path / "epochs" / f"{names[-1]}-seed0.jsonl").unlink()
    rows = {(name, 0): row(name) for name in names[1:]}
    paths = figures.draw_figures(rows, tmp_path / "epochs", tmp_path)
    assert [path.name for path in paths] == [*(f"figure6-{name}.png" for name in names[1:-1]), "overview.png"]


def test_figure_6_is_of_the_first_seed_that_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, name = [], "table6-c10-r110-lambda-0"
    real = figures.read_epochs

    def reading(path: Path) -> list[dict[str, Any]]:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(figures, "read_epochs", reading)
    for seed in (0, 2):
        write_epochs(tmp_path / "epochs", name, seed)
    rows = {(name, seed): row(name, seed) for seed in (2, 1)}
    figures.draw_figures(rows, tmp_path / "epochs", tmp_path)
    figures.draw_figures(rows | {(name, 0): row(name)}, tmp_path / "epochs", tmp_path)
    assert read == [f"{name}-seed2.jsonl", f"{name}-seed0.jsonl"]


def test_one_reading_is_enough(tmp_path: Path) -> None:
    name = "figure2-c10-r56-naive-dropout-50-swapped"
    for swapped, more in ((row(f"{OURS}-swapped"), ["overview.png"]), (row(name, kind="naive_dropout"), [])):
        paths = figures.draw_figures({swapped.key: swapped}, tmp_path / "epochs", tmp_path)
        assert [path.name for path in paths] == ["figure2.png", "figure3.png", *more]


def test_the_bench_is_drawn_from_all_its_seeds(tmp_path: Path) -> None:
    name = "cpu-r20-c10-dense"
    assert "cpu" in find_experiment(name).shown
    rows = {(name, seed): row(name, seed, kind="dense") for seed in (0, 1)}
    for seed in (0, 1):
        write_epochs(tmp_path / "epochs", name, seed)
    paths = figures.draw_figures(rows, tmp_path / "epochs", tmp_path)
    assert [path.name for path in paths] == ["cpu-bench.png", "overview.png"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cpu-r20-c10-dense", None, "could not read them .No such file"),
        ("cpu-r20-c10-dense", "", "expected the metrics of at least one epoch, found none"),
        ("table6-c10-r110-lambda-0", "", "expected the metrics of at least one epoch, found none"),
        ("table6-c10-r110-lambda-0", json.dumps(GATED | {"gate_open_rates": {}}), "expected open rates"),
    ],
)
def test_epochs_that_a_figure_lacks_are_reported_by_file(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / f"{name}-seed0.jsonl").write_text(text)
    kind = find_experiment(name).kind
    with pytest.raises(ValueError, match=f"{name}-seed0.jsonl: .*{message}"):
        figures.draw_figures({(name, 0): row(name, kind=kind)}, tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert figures.draw_figures({}, tmp_path / "epochs", tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ('{"epoch"', "is damaged"),
        ("[]", "expected "),
        (json.dumps(GATED | {"test_top1": None}), "test_top1"),
        (json.dumps({name: value for name, value in GATED.items() if name != "epoch"}), "epoch"),
        (json.dumps(GATED | {"gate_open_rates": [1.0]}), "gate_open_rates"),
        (json.dumps(GATED | {"color": 1}), "unknown key 'color'"),
    ],
)
def test_damaged_epochs_are_reported_by_file_and_line(tmp_path: Path, damage: str, message: str) -> None:
    path, after = tmp_path / "a.jsonl", json.dumps(GATED | {"phase": "compact", "gate_open_rates": {}})
    path.write_text(f"{json.dumps(GATED)}\n{after}\n{damage}\n")
    with pytest.raises(ValueError, match=f"a.jsonl: line 3.*{message}"):
        figures.read_epochs(path)
    path.write_text(f"{json.dumps(GATED)}\n{after}\n")
    assert [line["gate_open_rates"] for line in figures.read_epochs(path)] == [{"a": 1.0, "b": 0.5}, {}]
