"""The paper's figures 2, 3 and 6, and the curves of the CPU bench, from the ledger and the kept epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gatedconv._io import read_json_lines
from gatedconv.report import plots
from reproduce.experiment import Experiment
from reproduce.ledger import LedgerRow
from reproduce.table import all_experiments
from reproduce.tables import Rows, mean_spread, runs_of

# Table 1 of the paper: top-1 (%) before and after, and reduction of the FLOPs (%), ResNet-56 on CIFAR-10.
LITERATURE = {
    "paper, ours": (93.43, 92.42, 41.81),
    "AMC": (92.80, 91.90, 50.00),
    "Importance": (93.60, 91.90, 39.90),
    "SFP": (93.59, 92.26, 52.60),
    "CP": (92.80, 91.80, 50.00),
    "PFEC": (93.04, 91.31, 27.60),
    "VCP": (93.04, 92.26, 20.30),
}
_SERIES = {"gated": "ours", "dense": "dense", "naive_dropout": "naive dropout", "naive_layer": "naive layers"}
_SERIES_COLORS = {
    "ours": plots.GATED,
    "dense": plots.DENSE,
    "naive dropout": plots.POLAR,
    "naive layers": plots.STAGE,
}
_SWAPPED = ", swapped"  # the other reading of the paper's milestones, drawn hollow
_Series = Mapping[str, Sequence[Sequence[LedgerRow]]]  # by name, the runs of each of its experiments
_COLORS = {"gated": plots.GATED, "dense": plots.DENSE, "equal_macs": plots.POLAR, "fixed_at_init": plots.STAGE}


def draw_figures(rows: Rows, epochs: Path, folder: Path) -> list[Path]:
    """Draw every figure that the ledger has runs for.

    Args:
        rows: of the ledger.
        epochs: folder of the epochs' metrics, NAME-seedN.jsonl.
        folder: where the PNG files go; made if needed.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file of metrics is damaged or missing.
        OSError: a figure cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = all_experiments()
    drawn = []
    sweep = _sweep(rows)
    if sweep:
        drawn.append(_draw_rates(sweep, folder / "figure2.png"))
        drawn.append(_draw_drops(sweep, folder / "figure3.png"))
    for each in known.values():
        kept = [path for run in runs_of(each, rows) if (path := _epochs_of(run, epochs)).is_file()]
        if "figure6" in each.shown and kept:
            drawn.append(_draw_gates(each, kept[0], folder / f"figure6-{each.name}.png"))
    bench = [each for each in known.values() if "cpu" in each.shown and runs_of(each, rows)]
    if bench:
        drawn.append(_draw_bench(bench, rows, epochs, folder / "cpu-bench.png"))
    return drawn


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one mapping per epoch.

    Raises:
        ValueError: the file cannot be read or is empty, or a line is damaged or has other gates than those before it;
            names file and line.
    """
    found: list[dict[str, Any]] = []
    gates: set[str] = set()
    try:
        for where, record in read_json_lines(path):
            _check_epoch(record, where)
            rates = record.setdefault("gate_open_rates", {})
            gates = gates or set(rates)
            if rates and set(rates) != gates:
                other = min(gates ^ set(rates))
                raise ValueError(f"{where}: gate_open_rates: expected the gates of the lines before, {other!r} differs")
            found.append(record)
    except OSError as error:
        raise ValueError(f"{path}: expected the epochs of a run, could not read them ({error.strerror})") from None
    if not found:
        raise ValueError(f"{path}: expected the metrics of at least one epoch, found none")
    return found


def _check_epoch(record: Any, where: str) -> None:
    """Check the fields that the figures draw; an epoch without gates needs no λ."""
    if not isinstance(record, dict) or not isinstance(record.get("phase"), str):
        raise ValueError(f"{where}: expected the metrics of an epoch")
    rates = record.get("gate_open_rates", {})
    if not isinstance(rates, dict):
        raise ValueError(f"{where}: gate_open_rates: expected an object, got {rates!r}")
    names = ("epoch", "test_top1", *(("polar_weight",) if rates else ()))
    for name, value in [(name, record.get(name)) for name in names] + list(rates.items()):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{where}: {name}: expected a number, got {value!r}")


def _epochs_of(run: LedgerRow, epochs: Path) -> Path:
    return epochs / f"{run.experiment}-seed{run.seed}.jsonl"


def _draw_gates(experiment: Experiment, epochs: Path, path: Path) -> Path:
    """Figure 6 of one run."""
    lines = read_epochs(epochs)
    if not any(line["gate_open_rates"] for line in lines):
        raise ValueError(f"{epochs}: expected open rates of gates, found none")
    return plots.draw_gate_evolution(lines, path, title=experiment.label)


def _sweep(rows: Rows) -> _Series:
    """The runs of Figures 2 and 3, separately for each reading of the milestones."""
    series: dict[str, list[list[LedgerRow]]] = {}
    for each in all_experiments().values():
        runs = runs_of(each, rows) if "figure2" in each.shown else []
        if runs:
            name = _SERIES[each.kind] + (_SWAPPED if each.name.endswith("-swapped") else "")
            series.setdefault(name, []).append(runs)
    return series


def _look(name: str) -> dict[str, str]:
    """Color and filling of a series' marks."""
    color = _SERIES_COLORS[name.removesuffix(_SWAPPED)]
    return {"edgecolor": color, "facecolor": "none" if name.endswith(_SWAPPED) else color}


def _pruned(runs: Iterable[LedgerRow]) -> list[float]:
    return [100 * (run.pruning_rate or 0.0) for run in runs]


def _saved(runs: Iterable[LedgerRow]) -> list[float]:
    return [100 * (1 - run.macs / run.macs_dense) for run in runs]


def _draw_rates(sweep: _Series, path: Path) -> Path:
    """Figure 2: top-1 over pruning rate and over the reduction of the MACs."""
    plt = plots.pyplot()
    with plt.rc_context(plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.2), layout="constrained", sharey=True)
        for name, experiments in sweep.items():
            runs = [run for each in experiments for run in each]
            top1 = [run.top1_last for run in runs]
            left.scatter(_pruned(runs), top1, s=14, label=name, **_look(name))
            if not name.startswith("naive dropout"):  # its zeros are multiplied, too
                right.scatter(_saved(runs), top1, s=14, **_look(name))
        left.set_xlabel("pruning rate, eq. 11 (%)")
        right.set_xlabel("MACs saved (%)")
        left.set_ylabel("top-1 (%)")
        left.set_title("Against the naive baselines")
        left.legend(loc="lower left")
        return plots.save(figure, path, plt)


def _draw_drops(sweep: _Series, path: Path) -> Path:
    """Figure 3: top-1 over pruning rate, and its drop over the MACs saved, with the published results of others.

    The drop is from the mean of the dense runs of the same reading.
    """
    plt = plots.pyplot()
    with plt.rc_context(plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.4), layout="constrained")
        _rates_and_literature(left, sweep)
        for name, (before, after, saved) in LITERATURE.items():
            right.scatter([saved], [before - after], color=plots.MUTED, s=14)
            right.annotate(name, (saved, before - after), xytext=(4, 2), textcoords="offset points", fontsize=7)
        for suffix in ("", _SWAPPED):
            name, baselines = "ours" + suffix, sweep.get("dense" + suffix, ())
            dense = [run.top1_last for runs in baselines for run in runs]
            if dense and name in sweep:
                _mark(right, name, [(_saved(runs), _drops(fmean(dense), runs)) for runs in sweep[name]])
        right.set_xlabel("MACs saved (%)")
        right.set_ylabel("drop of top-1 (points)")
        right.set_title("Against the literature")
        return plots.save(figure, path, plt)


def _drops(dense: float, runs: Iterable[LedgerRow]) -> list[float]:
    return [dense - run.top1_last for run in runs]


def _rates_and_literature(axes: Any, sweep: _Series) -> None:
    """Ours as points, others as lines: the paper's table lacks their share of pruned parameters."""
    names: dict[float, list[str]] = {}
    for name, (_, after, _) in LITERATURE.items():
        names.setdefault(after, []).append(name)
    for after, those in names.items():
        axes.axhline(after, color=plots.GRID, zorder=0)
        axes.annotate(
            ", ".join(those),
            (1, after),
            xycoords=("axes fraction", "data"),
            xytext=(0, 1),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color=plots.MUTED,
        )
    for name, experiments in sweep.items():
        if not name.startswith("naive"):
            _mark(axes, name, [(_pruned(runs), [run.top1_last for run in runs]) for runs in experiments])
    axes.set_xlabel("pruning rate, eq. 11 (%)")
    axes.set_ylabel("top-1 (%)")
    axes.set_title("Against the literature")
    if axes.containers:
        axes.legend(fontsize=7)


def _mark(axes: Any, name: str, experiments: Iterable[tuple[Sequence[float], Sequence[float]]]) -> None:
    """One mark per experiment at the means over its runs, with the spread in y."""
    x_means, y_means = zip(*((fmean(x), mean_spread(y)) for x, y in experiments), strict=True)
    look = _look(name)
    axes.errorbar(
        x_means,
        [mean for mean, _ in y_means],
        yerr=[spread or 0.0 for _, spread in y_means],
        label=name,
        color=look["edgecolor"],
        markerfacecolor=look["facecolor"],
        marker="o",
        markersize=4,
        linestyle="none",
    )


_BENCH = "ResNet-20 CIFAR-10 "  # prefix of every label of the bench


def _draw_bench(bench: Sequence[Experiment], rows: Rows, epochs: Path, path: Path) -> Path:
    """The CPU bench: accuracy per epoch of the recipe and its controls, and the final accuracy of every row."""
    curves = {each.name: [read_epochs(_epochs_of(run, epochs)) for run in runs_of(each, rows)] for each in bench}
    plt = plots.pyplot()
    with plt.rc_context(plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for each in bench:
            runs, style = curves[each.name], "--" if each.name.endswith("-taught") else "-"
            if each.name.startswith(bench[0].name):
                length = min(len(lines) for lines in runs)
                mean = [mean_spread([lines[epoch]["test_top1"] for lines in runs])[0] for epoch in range(length)]
                left.plot(range(1, length + 1), mean, style, color=_COLORS[each.kind])
        for place, each in enumerate(bench):
            last, spread = mean_spread([row.top1_last for row in runs_of(each, rows)])
            right.errorbar([last], [place], xerr=spread, color=_COLORS[each.kind], marker="o", markersize=4)
        left.set_xlabel("epoch")
        left.set_ylabel("top-1 (%)")
        left.set_ylim(bottom=55)
        left.set_title("ResNet-20, 16x16, mean over seeds")
        left.grid(axis="y")
        right.set_xlabel("top-1, last epoch (%), mean and spread")
        right.set_yticks(range(len(bench)), [each.label.removeprefix(_BENCH) for each in bench])
        right.invert_yaxis()
        right.set_title("Last epoch")
        return plots.save(figure, path, plt)
