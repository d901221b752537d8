"""docs/results.md from the ledger: a table for each of the paper's tables and figures, and for our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from gatedconv.report.experiments import Experiment, all_experiments
from gatedconv.report.ledger import LedgerRow

Rows = Mapping[tuple[str, int], LedgerRow]

TITLES = {
    "headline": "Headline: ResNet-56 on CIFAR-10, one pass",
    "table4": "Table 4: layer and channel pruning of ResNet-110",
    "table1": 'Table 1: "Ours", ResNet-56 on CIFAR-10',
    "cifar100": "CIFAR-100",
    "table6": "Table 6: λ of the polarization loss, ResNet-110 on CIFAR-10",
    "table3": "Table 3: channel gates by design and position, ResNet-110 on CIFAR-10",
    "table5": "Table 5: gradient estimators, ResNet-110 on CIFAR-10, λ 3",
    "figure2": "Figures 2 and 3: sweep of λ_act and naive baselines, ResNet-56 on CIFAR-10",
    "recipes": "Our recipe at other depths, CIFAR-10",
    "cpu": "Two CPU cores: ResNet-20 on 25,000 CIFAR-10 images averaged to 16x16, 24 epochs",
    "ablations": "Ablations of the recipe on held-out training images",
}
# What the paper prints: top-1 (%), and MACs (M) where it gives them.
PRINTED = {
    "table1-c10-r56-dense": "93.43",
    "table1-c10-r56-ours": "92.42 ± 0.14 at 58 %",
    "table4-c10-r110-dense": "93.68 at 255.3 M",
    "table4-c10-r110-layer": "92.82 at 137.7 M; Table 6: 93.18",
    "table4-c10-r110-channel": "91.01 at 189.9 M",
    "table4-c100-r110-dense": "71.85 at 255.3 M",
    "table4-c100-r110-layer": "70.01 at 171.1 M",
    "table4-c100-r110-channel": "66.91 at 135.4 M",
    "table6-c10-r110-lambda-0": "90.79",
    "table6-c10-r110-lambda-1": "92.44",
    "table6-c10-r110-lambda-2": "91.67",
    "table6-c10-r110-lambda-3": "91.85; Table 5: 92.86",
    "table5-c10-r110-gumbel": "94.05",
    "table5-c10-r110-batch-mean": "91.96",
    "table3-c10-r110-1fc-before": "69.71",
    "table3-c10-r110-1fc-middle": "90.60",
    "table3-c10-r110-1fc-after": "83.89",
    "table3-c10-r110-2fc-before": "85.39",
    "table3-c10-r110-2fc-middle": "82.94",
}
_HEADER = (
    "run", "top-1, last epoch (%)", "seeds", "MACs (M)", "of dense", "gates open", "pruned (eq. 11)", "polar",
    "agreement", "before the freeze (%)", "its MACs (M)", "Wh", "J / image", "the paper",
)  # fmt: skip
_NOT_RUN = "not run yet"


def results_text(rows: Rows) -> str:
    """Every section as Markdown; rows that have no run in the ledger say so."""
    sections = []
    for shown, title in TITLES.items():
        members = [each for each in all_experiments().values() if shown in each.shown]
        if members:
            parts = [f"### {title}", _table(members, rows), *_verdicts(members, rows), *_unmeasured(members, rows)]
            sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Header and lines of equal length as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def write_block(path: Path, name: str, make: Callable[[], str]) -> str:
    """The file's text with the block of that name made anew.

    Raises:
        ValueError: the file has no such block.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin, written by docs/write.py -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: no block {begin} ... {end}")
    return f"{before}{begin}\n\n{make()}\n\n{end}{after}"


def runs_of(experiment: Experiment, rows: Rows) -> list[LedgerRow]:
    """The finished runs of an experiment, by seed."""
    return [rows[experiment.name, seed] for seed in experiment.seeds if (experiment.name, seed) in rows]


def mean_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation where there are two values or more."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def _table(members: Sequence[Experiment], rows: Rows) -> str:
    """Without the columns that nothing has a figure for."""
    lines = [_line(each, runs_of(each, rows)) for each in members]
    used = [column for column in range(len(_HEADER)) if column < 3 or any(line[column] for line in lines)]
    return markdown_table([_HEADER[c] for c in used], [[line[c] for c in used] for line in lines])


def _line(experiment: Experiment, runs: Sequence[LedgerRow]) -> list[str]:
    printed = PRINTED.get(experiment.name.removesuffix("-swapped"), "")
    seeds = f"{len(runs)} of {len(experiment.seeds)}"
    if not runs:
        return [experiment.label, _NOT_RUN, seeds, *[""] * (len(_HEADER) - 4), printed]
    return [
        experiment.label,
        _shown([run.top1_last for run in runs], 2),
        seeds,
        _shown([run.macs / 1e6 for run in runs], 2),
        f"{100 * fmean(run.macs / run.macs_dense for run in runs):.1f} %",
        _shown([run.open_ratio for run in runs], 1, 100, " %"),
        _shown([run.pruning_rate for run in runs], 1, 100, " %"),
        _shown([run.polar for run in runs], 4),
        _shown([run.agreement for run in runs], 2, 100, " %"),
        _shown([run.top1_dynamic for run in runs], 2),
        _shown([None if run.macs_dynamic is None else run.macs_dynamic / 1e6 for run in runs], 2),
        _shown([None if run.energy_j is None else run.energy_j / 3600 for run in runs], 2),
        _shown([run.energy_j_image for run in runs], 5),
        printed,
    ]


def _shown(values: Sequence[float | None], digits: int, scale: float = 1.0, unit: str = "") -> str:
    known = [value * scale for value in values if value is not None]
    if not known:
        return ""
    mean, spread = mean_spread(known)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "") + unit


def _unmeasured(members: Sequence[Experiment], rows: Rows) -> list[str]:
    """A sentence where energy was not measurable; the columns then lack it, or are not there."""
    runs = [run for each in members for run in runs_of(each, rows) if each.trains]
    silent = sum(run.energy_j is None for run in runs)
    return [f"Energy: not measurable on the machine of {silent} of these {len(runs)} runs."] if silent else []


def _verdicts(members: Sequence[Experiment], rows: Rows) -> list[str]:
    """A sentence for every control of a gated run: by how much it is beaten, or beats."""
    known = all_experiments()
    lines = []
    for control in members:
        if control.kind not in ("equal_macs", "fixed_at_init"):
            continue
        gated = known[control.needs]
        seeds = [seed for seed in gated.seeds if {(gated.name, seed), (control.name, seed)} <= rows.keys()]
        if len(seeds) < 2:
            continue
        mine = mean_spread([rows[gated.name, seed].top1_last for seed in seeds])
        theirs = mean_spread([rows[control.name, seed].top1_last for seed in seeds])
        ahead, spread = mine[0] - theirs[0], max(mine[1] or 0.0, theirs[1] or 0.0)
        verdict = "a win" if ahead > spread else "a loss" if ahead < -spread else "a tie, within the spread"
        lines.append(
            f"- {gated.label} against {control.label.rpartition(', ')[2]}: {ahead:+.2f} points, {len(seeds)} seeds, "
            f"larger spread {spread:.2f}: {verdict}."
        )
    return ["\n".join(lines)] if lines else []
