"""Plots of a run: the open rates of its gates (the paper's Figure 6), and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

History = Sequence[Mapping[str, Any]]

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
DENSE, GATED, POLAR, STAGE = "#64748b", "#0f766e", "#b45309", "#db2777"
STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.edgecolor": "white",
    "legend.fancybox": False,
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.6,
}


def draw_all(history: History, folder: Path, *, title: str = "") -> list[Path]:
    """Draw every plot that the metrics of a run allow.

    Args:
        history: one mapping per epoch with the fields of metrics.jsonl.
        folder: where the PNG files go; made if needed.
        title: of the run, for the headings.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw_curves(history, folder / "curves.png", title=title)]
    if any(line["gate_open_rates"] for line in history):
        drawn.append(draw_gate_evolution(history, folder / "gate_evolution.png", title=title))
    return drawn


def draw_gate_evolution(history: History, path: Path, *, title: str = "") -> Path:
    """Heat map of the open rates, rows = gates, columns = epochs, as the paper's Figure 6.

    A vertical line marks each epoch at which λ of the polarization loss jumps.
    """
    plt = pyplot()
    lines = [line for line in history if line["gate_open_rates"]]
    names = list(lines[0]["gate_open_rates"])
    rates = [[line["gate_open_rates"][name] for line in lines] for name in names]
    with plt.rc_context(STYLE):
        height = min(9.0, 1.5 + 0.22 * len(names))
        figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
        # Edges, not centers, so that epoch e covers the column from e - 0.5 to e + 0.5.
        extent = (lines[0]["epoch"] - 0.5, lines[-1]["epoch"] + 0.5, len(names) - 0.5, -0.5)
        image = axes.imshow(
            rates, aspect="auto", interpolation="nearest", cmap=_open_closed_map(), vmin=0, vmax=1, extent=extent
        )
        axes.set_yticks([row - 0.5 for row in range(1, len(names))], minor=True)
        axes.grid(axis="y", which="minor", color="white", linewidth=1.0)
        for epoch, weight in _jumps(lines):
            axes.axvline(epoch - 0.5, color=STAGE, linewidth=1.4)
            axes.annotate(
                f"λ = {weight:g}",
                (epoch - 0.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, 2),
                textcoords="offset points",
                color=STAGE,
                fontsize=8,
                annotation_clip=False,
            )
        labels = [name.removesuffix("_gate").replace(".layer", "").replace(".channel", " ch") for name in names]
        every = max(1, -(-len(names) // 30))
        axes.set_yticks(range(0, len(names), every), labels[::every])
        axes.tick_params(which="both", length=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("epoch")
        axes.set_title(_heading("Which gates are open", title), pad=14)
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["closed", "half", "open"])
        bar.outline.set_visible(False)
        return save_figure(figure, path, plt)


def draw_curves(history: History, path: Path, *, title: str = "") -> Path:
    """Two panels over the epochs: accuracy of every training, and open rate, MACs and polarization."""
    plt = pyplot()
    gated = [line for line in history if line["phase"] == "gated"]
    compact = [line for line in history if line["phase"] == "compact"]  # continues after the consensus
    trainings = {"dense": [line for line in history if line["phase"] == "dense"], "gated": gated + compact}
    with plt.rc_context(STYLE):
        panels = 2 if gated else 1
        figure, grid = plt.subplots(1, panels, figsize=(4.4 * panels, 3.2), layout="constrained", squeeze=False)
        _accuracy_panel(grid[0][0], trainings, title)
        if gated:
            _gates_panel(grid[0][1], gated)
        return save_figure(figure, path, plt)


def _accuracy_panel(axes: Any, trainings: Mapping[str, History], title: str) -> None:
    lows = []
    for (name, lines), color in zip(trainings.items(), (DENSE, GATED), strict=True):
        if not lines:
            continue
        epochs = [line["epoch"] for line in lines]
        tested = [line["test_top1"] for line in lines]
        axes.plot(epochs, [line["train_top1"] for line in lines], color=color, alpha=0.35, linewidth=1.0)
        axes.plot(epochs, tested, color=color, label=f"{name}: {tested[-1]:.2f} %")
        lows.append(sorted(tested)[len(tested) // 4])
    # With the first epochs in view, the interesting range would be a thin band at the top.
    low = max(0.0, min(lows) - 3 * (100 - min(lows)) - 1)
    axes.set_ylim(low, 100 + 0.03 * (100 - low))
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 (%), pale: training batches")
    axes.set_title(_heading("Accuracy", title))
    axes.grid(axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right")


def _gates_panel(axes: Any, lines: History) -> None:
    epochs = [line["epoch"] for line in lines]
    for key, color, label in (("open_rate", GATED, "open rate"), ("macs", INK, "MACs over dense")):
        values = [100 * line[key] for line in lines]
        axes.plot(epochs, values, color=color, label=f"{label}: {values[-1]:.1f} %")
    # (1 - g) g is at most 1/4: four times it spans 0 to 100 % like the others.
    disagreement = [400 * line["polarization"] for line in lines]
    axes.plot(epochs, disagreement, color=POLAR, label=f"disagreement, 4g(1-g): {disagreement[-1]:.1f} %")
    for epoch, _ in _jumps(lines):
        axes.axvline(epoch - 0.5, color=STAGE, linewidth=1.0, alpha=0.6)
    axes.set_ylim(-2, 103)
    axes.set_xlabel("epoch")
    axes.set_ylabel("share (%)")
    axes.set_title("Gates")
    axes.grid(axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper right")


def _jumps(lines: History) -> list[tuple[int, float]]:
    """Epochs at which λ differs from the epoch before, and its new value; none for a ramp of many steps."""
    found = [
        (after["epoch"], after["polar_weight"])
        for before, after in zip(lines, lines[1:], strict=False)
        if after["polar_weight"] != before["polar_weight"]
    ]
    return found if len(found) <= 4 else []


def _open_closed_map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("open_closed", ["#f1f5f9", "#7cc4bb", "#0b5d56"])


def _heading(what: str, title: str) -> str:
    return f"{what}  ({title})" if title else what


def pyplot() -> Any:
    """Matplotlib's pyplot, without a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'gatedconv[demo]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Any, path: Path, plt: Any) -> Path:
    """Write a figure and close it; returns the path."""
    figure.savefig(path)
    plt.close(figure)
    return path
