"""The overview, the paper's figures 2, 3 and 6, and the curves of the CPU bench, from the ledger and the epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import gatedconv
from gatedconv.report import plots
from gatedconv.train.metrics import EpochMetrics
from reproduce.experiment import Experiment
from reproduce.experiments import all_experiments
from reproduce.ledger import LedgerRow, read_json_lines
from reproduce.result_tables import Rows, dense_pairs, interval, mean_spread, runs_of

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
# Top-1 (%) of others' ResNets on CIFAR-10 and the MACs removed (%), as printed: SFP and FPGM from scratch
# (arXiv 1811.00250, table 1), the others as collected in ManiDP (arXiv 2103.05861).
OTHERS = {
    "resnet20": {
        "dense": (92.20, 0.0),
        "SFP": (90.83, 42.2),
        "FPGM": (90.44, 54.0),
        "DSA": (91.38, 50.3),
        "DHP": (91.54, 51.8),
        "Hinge": (91.84, 45.5),
    },
    "resnet56": {
        "dense": (93.59, 0.0),
        "DSA": (92.91, 52.2),
        "SFP": (92.26, 52.6),
        "HRank": (93.17, 50.0),
        "FPGM": (92.93, 52.6),
        "DHP": (93.58, 50.9),
    },
}
_SERIES = {"gated": "ours", "dense": "dense", "naive_dropout": "naive dropout", "naive_layer": "naive layers"}
_SERIES_COLORS = {"ours": plots.GATED, "dense": plots.DENSE, "naive dropout": plots.POLAR, "naive layers": plots.STAGE}
_SWAPPED = ", swapped"  # the other reading of the paper's milestones, drawn hollow
_Series = Mapping[str, Sequence[Sequence[LedgerRow]]]  # by name, the runs of each of its experiments
_COLORS = {
    "gated": plots.GATED,
    "dense": plots.DENSE,
    "equal_macs": plots.POLAR,
    "fixed_at_init": plots.STAGE,
    "taught_before": "#7c3aed",
    "paper": "#0284c7",
}
_KINDS = {"gated": "ours", "paper": "the paper's method", "equal_macs": "equal MACs"}  # in words; others as they are
_MARKERS = {"resnet20": "s", "resnet56": "^", "cifar_vgg": "o"}


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
    if any(_counts(each) and runs_of(each, rows) for each in known.values()):
        drawn.append(_draw_overview(rows, folder / "overview.png"))
    return drawn


def _counts(experiment: Experiment) -> bool:
    """Whether it belongs in the overview: trained, and evaluated on the test images."""
    return experiment.trains and experiment.settings.get("evaluate_on", "test") == "test"


def _draw_overview(rows: Rows, path: Path) -> Path:
    """Top-1 over MACs on all of CIFAR-10, and how far every experiment is from its dense network."""
    plt = plots.pyplot()
    known = [each for each in all_experiments().values() if _counts(each) and runs_of(each, rows)]
    apart = [(each, pairs) for each in known if (pairs := dense_pairs(each, rows))]
    on_all = [(each, runs) for each in known if (runs := runs_of(each, rows))[0].dataset == "cifar10"]
    with plt.rc_context(plots.STYLE):
        height = max(3.8, 0.8 + 0.22 * len(apart))
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained", width_ratios=(4, 3))
        for model, others in OTHERS.items():
            macs = gatedconv.count_macs(getattr(gatedconv.models, model)(), torch.zeros(1, 3, 32, 32)) / 1e6
            for place, (name, (top1, removed)) in enumerate(others.items()):
                left_over = macs * (1 - removed / 100)
                left.scatter([left_over], [top1], color="none", edgecolor=plots.MUTED, s=14, marker=_MARKERS[model])
                _name_point(left, name, left_over, top1, on_left=place % 2 == 1)
        for each, runs in on_all:
            top1, spread = mean_spread([run.top1_last for run in runs])
            left.errorbar([fmean(run.macs for run in runs) / 1e6], [top1], yerr=spread, **_dot(each, runs[0].model))
        for place, (each, pairs) in enumerate(apart):
            behind, half = interval([mine.top1_last - theirs.top1_last for mine, theirs in pairs])
            right.errorbar([behind], [place], xerr=half, **_dot(each, pairs[0][0].model))
        left.set_xlim(0, 1.05 * left.get_xlim()[1])  # room for the names
        left.set_xlabel("MACs (M)")
        left.set_ylabel("top-1, last epoch (%)")
        left.set_title("All of CIFAR-10; hollow: as printed by others")
        right.axvline(0, color=plots.GRID, zorder=0)
        right.set_xlabel("difference in points, 95 % interval")
        right.set_yticks(range(len(apart)), [_name_with_share(each, pairs) for each, pairs in apart], fontsize=7)
        right.invert_yaxis()
        right.set_title("Against the dense network")
        marks = {_KINDS.get(kind, kind.replace("_", " ")): ("o", _COLORS[kind]) for kind in map(_kind, known)}
        models = dict.fromkeys(run.model for _, runs in on_all for run in runs)
        marks |= {model: (_MARKERS.get(model, "D"), plots.INK) for model in models}
        handles = [
            plt.Line2D([], [], linestyle="none", color=color, marker=marker, markersize=4, label=label)
            for label, (marker, color) in marks.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(marks), fontsize=7)
        return plots.save_figure(figure, path, plt)


def _name_with_share(experiment: Experiment, pairs: Sequence[tuple[LedgerRow, LedgerRow]]) -> str:
    """ResNet-20 gated, equal MACs (50 %), with the images' size where they are not the data set's own."""
    data, _, images = pairs[0][0].dataset.partition("-")
    share = 100 * fmean(mine.macs / theirs.macs for mine, theirs in pairs)
    label = experiment.label.replace(" CIFAR-10", "") if data == "cifar10" else experiment.label
    return f"{label}{f' {images}' if images else ''} ({share:.0f} %)"


def _kind(experiment: Experiment) -> str:
    """That of the experiment; "paper" for gates by the paper's own recipe."""
    return "paper" if experiment.kind == "gated" and experiment.preset.startswith("paper") else experiment.kind


def _dot(experiment: Experiment, model: str) -> dict[str, Any]:
    marker = _MARKERS.get(model, "D")
    return {"color": _COLORS[_kind(experiment)], "marker": marker, "markersize": 4, "linewidth": 1}


def _name_point(axes: Any, name: str, x: float, y: float, *, on_left: bool = False) -> None:
    side = {"xytext": (-4, -2), "ha": "right"} if on_left else {"xytext": (4, 2)}
    axes.annotate(name, (x, y), textcoords="offset points", fontsize=7, color=plots.MUTED, **side)


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one mapping per epoch.

    Raises:
        ValueError: the file cannot be read or is empty, or a line is damaged; names file and line.
    """
    try:
        found = [EpochMetrics.from_dict(record, where).as_dict() for where, record in read_json_lines(path)]
    except OSError as error:
        raise ValueError(f"{path}: expected the epochs of a run, could not read them ({error.strerror})") from None
    if not found:
        raise ValueError(f"{path}: expected the metrics of at least one epoch, found none")
    return found


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
        return plots.save_figure(figure, path, plt)


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
            _name_point(right, name, saved, before - after)
        for suffix in ("", _SWAPPED):
            name, baselines = "ours" + suffix, sweep.get("dense" + suffix, ())
            dense = [run.top1_last for runs in baselines for run in runs]
            if dense and name in sweep:
                _mark(right, name, [(_saved(runs), _drops(fmean(dense), runs)) for runs in sweep[name]])
        right.set_xlabel("MACs saved (%)")
        right.set_ylabel("drop of top-1 (points)")
        right.set_title("Against the literature")
        return plots.save_figure(figure, path, plt)


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
        return plots.save_figure(figure, path, plt)
