"""The tables of docs/results.md from the ledger: those of the paper, of its figures, and our own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from gatedconv.report.tables import markdown_table
from reproduce.experiment import Experiment
from reproduce.experiments import all_experiments
from reproduce.ledger import LedgerRow

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
    "fastc10": "The network that trains in minutes: CIFAR-10, 10 epochs, half of the MACs",
    "fast30": "The same at 30 % of the MACs",
    "epochs40": "ResNet-56 on CIFAR-10 in 40 epochs: the paper's method and ours",
    "epochs60": "ResNet-20 on CIFAR-10 in 60 epochs",
    "fastc100": "CIFAR-100: the network that trains in minutes",
    "epochs60c100": "CIFAR-100: ResNet-20 in 60 epochs",
    "small5": "Gradient estimators in small: ResNet-20 on CIFAR-10, 30 epochs, λ 3",
    "small6": "λ in small: ResNet-20 on CIFAR-10, 30 epochs",
    "ablations": "Ablations of the recipe on held-out training images",
}
# Printed in the paper: top-1 (%), and MACs (M) where it gives them.
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
    "run",
    "top-1, last epoch (%)",
    "seeds",
    "MACs (M)",
    "of dense",
    "conv and fc alone",
    "gates open",
    "pruned (eq. 11)",
    "polar",
    "agreement",
    "before the freeze (%)",
    "its MACs (M)",
    "teacher (%)",
    "training (TMACs)",
    "core-minutes",
    "Wh",
    "J / image",
    "gated minus this, paired by seed [95 %]",
    "the paper",
)
_NOT_RUN = "not run yet"
_CONTROLS = ("equal_macs", "fixed_at_init", "taught_before")
# 97.5 % quantiles of Student's t, by degrees of freedom: half a 95 % interval in standard errors.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_OVERVIEW = (
    "![Top-1 over MACs, and the distance to the dense network](images/overview.png)\n\n"
    "Left: our networks trained and tested on all of CIFAR-10, mean and spread over the seeds, and hollow what "
    "others print for ResNet-20 and ResNet-56 at about half of the MACs, by recipes of 200 epochs and more. Right: "
    "what each experiment loses against the dense network of the same recipe and seed."
)
FIGURES = {"figure2": {"figure2.png": "Figure 2", "figure3.png": "Figure 3"}}  # by section; table6 has Figure 6


def results_text(rows: Rows, recipes: Mapping[str, str] | None = None, images: Collection[str] = ()) -> str:
    """Every section as Markdown; tables without a run are in one list at the end.

    Args:
        rows: of the ledger.
        recipes: each experiment's present recipe; runs of another one are left out, with a remark.
        images: names of the figures that exist.
    """
    recipes = recipes or {}
    present, sections, waiting = present_rows(rows, recipes), list[str](), list[list[str]]()
    for shown, title in TITLES.items():
        members = [each for each in all_experiments().values() if shown in each.shown]
        remarks = _remarks(members, rows, recipes)
        if not remarks and not any(runs_of(each, present) for each in members):
            waiting.append([title, str(sum(len(each.seeds) for each in members)), _printed(members)])
            continue
        parts = [f"### {title}", _table(members, present), *_reading(members, present), *_unmeasured(members, present)]
        sections.append("\n\n".join([*parts, *remarks, *_figures(shown, images)]))
    if "overview.png" in images:
        sections.insert(0, _OVERVIEW)
    if waiting:
        header = ["table", "runs", "the paper's top-1 (%)"]
        sections.append(f"### Not run yet\n\n{markdown_table(header, waiting)}")
    return "\n\n".join([*sections, *_unknown(rows)])


def _printed(members: Sequence[Experiment]) -> str:
    """The figures that the paper prints for a table."""
    return "; ".join(f"{each.label}: {PRINTED[each.name]}" for each in members if each.name in PRINTED)


def present_rows(rows: Rows, recipes: Mapping[str, str]) -> dict[tuple[str, int], LedgerRow]:
    """The rows that belong in the tables: of a known experiment, by its present recipe."""
    known = all_experiments()
    return {
        key: row
        for key, row in rows.items()
        if row.experiment in known and not _why_left_out(known[row.experiment], row, recipes)
    }


def left_out(experiment: Experiment, rows: Rows, recipes: Mapping[str, str]) -> Counter[str]:
    """The number of rows of an experiment that `present_rows` leaves out, by reason ("by an earlier recipe")."""
    reasons = (_why_left_out(experiment, row, recipes) for row in rows.values() if row.experiment == experiment.name)
    return Counter(reason for reason in reasons if reason)


def _why_left_out(experiment: Experiment, row: LedgerRow, recipes: Mapping[str, str]) -> str:
    split = experiment.settings.get("evaluate_on", "test")
    if row.seed not in experiment.seeds:
        return "of seeds that are not in the table"
    if row.kind != experiment.kind:
        return f"of kind {row.kind} (not {experiment.kind})"
    if row.evaluated_on != split:
        return f"evaluated on {row.evaluated_on} (not {split})"
    return "" if row.recipe in (None, recipes.get(row.experiment, row.recipe)) else "by an earlier recipe"


def replace_block(path: Path, name: str, body: str, text: str | None = None) -> str:
    """The text of a document with the block of that name replaced.

    Args:
        path: the document.
        name: of the block, between ``<!-- NAME: begin, ... -->`` and ``<!-- NAME: end -->``.
        body: its new content.
        text: the document's text; None reads it.

    Raises:
        ValueError: the document has no such block.
    """
    text = path.read_text(encoding="utf-8") if text is None else text
    begin, end = rf"<!-- {re.escape(name)}: begin[^>]*-->", f"<!-- {re.escape(name)}: end -->"
    found = re.search(f"({begin}).*?({end})", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{path}: expected the block <!-- {name}: begin ... --> ... <!-- {name}: end -->, found none")
    return f"{text[: found.start()]}{found[1]}\n\n{body}\n\n{found[2]}{text[found.end() :]}"


def runs_of(experiment: Experiment, rows: Rows) -> list[LedgerRow]:
    """The finished runs of an experiment, by seed."""
    return [rows[experiment.name, seed] for seed in experiment.seeds if (experiment.name, seed) in rows]


def mean_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation where there are two values or more."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def _table(members: Sequence[Experiment], rows: Rows) -> str:
    """One line per experiment; columns without a figure are left out."""
    lines = [_line(each, rows) for each in members]
    used = [column for column in range(len(_HEADER)) if column < 3 or any(line[column] for line in lines)]
    return markdown_table([_HEADER[c] for c in used], [[line[c] for c in used] for line in lines])


def _line(experiment: Experiment, rows: Rows) -> list[str]:
    runs = runs_of(experiment, rows)
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
        _share_of_convolutions(runs),
        _shown([run.open_ratio for run in runs], 1, 100, " %"),
        _shown([run.pruning_rate for run in runs], 1, 100, " %"),
        _shown([run.polar for run in runs], 4),
        _shown([run.agreement for run in runs], 2, 100, " %"),
        _shown([run.top1_dynamic for run in runs], 2),
        _shown([None if run.macs_dynamic is None else run.macs_dynamic / 1e6 for run in runs], 2),
        _shown([run.top1_teacher for run in runs], 2),
        _shown([None if run.train_macs is None else run.train_macs / 1e12 for run in runs], 2),
        _shown([run.core_minutes if run.device == "cpu" else None for run in runs], 1),
        _shown([None if run.energy_j is None else run.energy_j / 3600 for run in runs], 2),
        _shown([run.energy_j_image for run in runs], 5),
        _paired(experiment, rows),
        printed,
    ]


def _share_of_convolutions(runs: Sequence[LedgerRow]) -> str:
    """Share of the dense MACs, counting convolutions and linear layers only, as in OCSPruner."""
    known = [run.macs_conv / run.macs_conv_dense for run in runs if run.macs_conv and run.macs_conv_dense]
    return f"{100 * fmean(known):.1f} %{_of(known, runs)}" if known else ""


def _of(known: Sequence[object], runs: Sequence[object]) -> str:
    """A note where a figure covers only some of the runs."""
    return f" ({len(known)} of {len(runs)})" if len(known) < len(runs) else ""


def _paired(control: Experiment, rows: Rows) -> str:
    """Lead of the gated run over its control, paired by seed, which removes the variance of the seed."""
    if control.kind not in _CONTROLS:
        return ""
    ahead = [a.top1_last - b.top1_last for a, b in paired_runs(all_experiments()[control.needs], control, rows)]
    return interval_text(ahead).split(" points")[0] if ahead else ""


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval (Student's t); None for a single difference.

    Raises:
        ValueError: there are none, or more than 10.
    """
    if not 1 <= len(differences) <= len(_T95) + 1:
        raise ValueError(f"interval: expected 1 to {len(_T95) + 1} differences, got {len(differences)}")
    mean, spread = mean_spread(differences)
    return mean, None if spread is None else _T95[len(differences) - 2] * spread / len(differences) ** 0.5


def paired_runs(mine: Experiment, theirs: Experiment, rows: Rows) -> list[tuple[LedgerRow, LedgerRow]]:
    """The finished runs of two experiments with the same seeds."""
    keys = [((mine.name, seed), (theirs.name, seed)) for seed in theirs.seeds]
    return [(rows[a], rows[b]) for a, b in keys if {a, b} <= rows.keys()]


def dense_pairs(experiment: Experiment, rows: Rows) -> list[tuple[LedgerRow, LedgerRow]]:
    """The runs of an experiment with those of its dense network, by seed; none for a dense network."""
    return paired_runs(experiment, all_experiments()[experiment.dense], rows) if experiment.dense else []


def _shown(values: Sequence[float | None], digits: int, scale: float = 1.0, unit: str = "") -> str:
    known = [value * scale for value in values if value is not None]
    if not known:
        return ""
    mean, spread = mean_spread(known)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "") + unit + _of(known, values)


def _unmeasured(members: Sequence[Experiment], rows: Rows) -> list[str]:
    """A sentence on runs without a measured energy."""
    runs = [run for each in members for run in runs_of(each, rows) if each.trains]
    silent = Counter(run.energy_reason or "no counter on the machine" for run in runs if run.energy_j is None)
    reasons = "; ".join(f"{reason} ({count} of these {len(runs)} runs)" for reason, count in silent.items())
    return [f"Energy not measured: {reasons}."] if reasons else []


def _remarks(members: Sequence[Experiment], rows: Rows, recipes: Mapping[str, str]) -> list[str]:
    """Sentences on rows that are left out, rows without a recipe, and rows of changed sources."""
    lines = [
        f"{each.label}: {count} runs {reason} are left out."
        for each in members
        for reason, count in left_out(each, rows, recipes).items()
    ]
    present = present_rows(rows, recipes)
    runs = [run for each in members for run in runs_of(each, present)]
    silent = sum(run.recipe is None for run in runs)
    if silent:
        lines.append(f"Recipe: not recorded for {silent} of these {len(runs)} runs, which are older than the field.")
    devices = Counter(run.device for run in runs if run.device != "cpu")
    lines += [f"Trained on {device}: {count} of these {len(runs)} runs." for device, count in devices.items()]
    changed = sum((run.commit or "").endswith("+changes") for run in runs)
    if changed:
        lines.append(f"Source: {changed} of these {len(runs)} runs are from sources with changes.")
    return ["\n".join(lines)] if lines else []


def _unknown(rows: Rows) -> list[str]:
    """A sentence on rows of unknown experiments."""
    known = all_experiments()
    names = Counter(row.experiment for row in rows.values() if row.experiment not in known)
    counts = ", ".join(f"{name} ({count})" for name, count in names.items())
    return [f"Left out, of experiments that are not in the table (runs): {counts}."] if counts else []


def _figures(shown: str, images: Collection[str]) -> list[str]:
    """Links to the figures of a section, or "not drawn yet"."""
    wanted = dict(FIGURES.get(shown, {}))
    if shown == "table6":
        gated = [each for each in all_experiments().values() if "figure6" in each.shown]
        wanted |= {f"figure6-{each.name}.png": f"Figure 6, {each.label}" for each in gated}
    if not wanted:
        return []
    drawn = [f"![{title}](images/{name})" for name, title in wanted.items() if name in images]
    return drawn or [f"{' and '.join(dict.fromkeys(title.split(',')[0] for title in wanted.values()))}: not drawn yet."]


def _reading(members: Sequence[Experiment], rows: Rows) -> list[str]:
    """Sentences on every gated run: its distance to the dense network and its cost, and its lead over each control."""
    lines = []
    for gated in members:
        if gated.kind != "gated" or not runs_of(gated, rows):
            continue
        lines.append(_cost(gated, rows))
        # A network gated without a teacher has to beat the controls that have one, too.
        rivals = (gated.name, f"{gated.name}-taught")
        lines += [_lead(gated, each, rows) for each in members if each.kind in _CONTROLS and each.needs in rivals]
    lines = [f"- {line}" for line in lines if line]
    return ["\n".join(lines)] if lines else []


def _cost(gated: Experiment, rows: Rows) -> str:
    pairs = dense_pairs(gated, rows)
    if not pairs:
        return ""
    macs = fmean(mine.macs / theirs.macs for mine, theirs in pairs)
    cost = [mine.train_macs / theirs.train_macs for mine, theirs in pairs if mine.train_macs and theirs.train_macs]
    training = f", training at {fmean(cost):.2f} times the MACs" if cost else ""
    ahead = interval_text([mine.top1_last - theirs.top1_last for mine, theirs in pairs])
    return f"{gated.label} against dense: {ahead} at {100 * macs:.1f} % of the MACs{training}."


def _lead(gated: Experiment, control: Experiment, rows: Rows) -> str:
    pairs = paired_runs(gated, control, rows)
    if len(pairs) < 2:
        return ""
    differences = [mine.top1_last - theirs.top1_last for mine, theirs in pairs]
    ahead, half = interval(differences)
    assert half is not None  # there are two seeds
    verdict = "significant" if abs(ahead) > half else "not significant"
    paid = [(mine.train_macs, _paid(control, theirs, rows)) for mine, theirs in pairs]
    cost = [mine / theirs for mine, theirs in paid if mine and theirs]
    training = f" Training took {fmean(cost):.2f} times the control's MACs." if cost else ""
    rival = control.label.removeprefix(all_experiments()[control.needs].label + ", ")
    return f"{gated.label} against {rival}: {interval_text(differences)}, {verdict}.{training}"


def _paid(control: Experiment, run: LedgerRow, rows: Rows) -> float | None:
    """MACs of a control's training, with that of the network that was trained before to teach it."""
    if not control.taught_by:
        return run.train_macs
    before = rows.get((control.taught_by, run.seed))
    return run.train_macs + before.train_macs if run.train_macs and before and before.train_macs else None


def interval_text(differences: Sequence[float]) -> str:
    """The mean of differences, its 95 % interval and their number."""
    mean, half = interval(differences)
    if half is None:
        return f"{mean:+.2f} points in 1 seed"
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] points in {len(differences)} seeds"
