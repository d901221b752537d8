"""The experiment table: every run of the paper's tables and figures, our recipes, and their controls.

Ordered by what a GPU minute buys; `reproduce.schedule` has other orders. Nothing here runs anything:
`reproduce.runner` does.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from reproduce.experiment import FIVE, THREE, Experiment, Settings, controls, with_controls
from reproduce.experiments_cpu import cpu_bench, fast, few_epochs
from reproduce.paper_presets import TABLE1

PRUNED_SHARES = (20, 30, 50, 60, 80)  # percent, of the naive baselines
ACT_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # λ_act of Figures 2 and 3, in [0, 1]; not printed in the paper


@cache
def all_experiments() -> Mapping[str, Experiment]:
    """Every experiment by name, in table order; read-only."""
    found: dict[str, Experiment] = {}
    for experiment in (
        *with_controls("headline-r56-c10", "best-c10-r56", "headline", FIVE),
        *_readings(_table4),
        *_readings(_table1),
        *with_controls("ours-r56-c100", "best-c100-r56", "cifar100"),
        *with_controls("ours-r110-c100", "best-c100-r110", "cifar100"),
        *_readings(_table6),
        *_readings(_table3),
        *_readings(_table5),
        *_readings(_figures),
        *with_controls("ours-r110-c10", "best-c10-r110", "recipes"),
        *(
            row
            for depth in (20, 32, 44)
            for row in with_controls(f"ours-r{depth}-c10", f"best-c10-r{depth}", "recipes")
        ),
        *cpu_bench(),
        *fast(),
        *few_epochs(),
    ):
        if experiment.name in found:
            raise ValueError(f"experiments: {experiment.name!r} is listed twice")
        found[experiment.name] = experiment
    return MappingProxyType(found)


def find_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none; the message lists the nearest names.
    """
    known = all_experiments()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or list(known)[:1]
        raise ValueError(f"unknown experiment {name!r}; did you mean {' or '.join(near)}?")
    return known[name]


def _readings(make: Callable[[str], Iterator[Experiment]]) -> Iterator[Experiment]:
    """Both readings of the paper's milestones: as printed, and exchanged between the two data sets."""
    for suffix in ("", "-swapped"):
        yield from make(suffix)


def _paper(
    name: str,
    preset: str,
    suffix: str,
    shown: tuple[str, ...],
    label: str,
    settings: Settings | None = None,
    kind: str = "gated",
    seeds: tuple[int, ...] = THREE,
    dense: str = "",
) -> Experiment:
    label = label + (", swapped" if suffix else "")
    without = dense and dense + suffix
    return Experiment(name + suffix, kind, preset + suffix, settings or {}, seeds, shown, label, dense=without)


def _table4(suffix: str) -> Iterator[Experiment]:
    for data in ("c10", "c100"):
        also = ("table3", "table6") if data == "c10" else ("cifar100",)
        net = f"CIFAR-{data[1:]}"
        yield _paper(
            f"table4-{data}-r110-dense",
            f"paper-{data}-r110-dense",
            suffix,
            ("table4", *also),
            f"{net} baseline",
            kind="dense",
        )
        layer_also = ("table6", "figure6") if data == "c10" else ("cifar100",)
        layer = _paper(
            f"table4-{data}-r110-layer",
            f"paper-{data}-r110-layer",
            suffix,
            ("table4", *layer_also),
            f"{net} layer pruned" + (", λ rising" if data == "c10" else ""),
            dense=f"table4-{data}-r110-dense",
        )
        channel_also = ("table3",) if data == "c10" else ("cifar100",)
        channel = _paper(
            f"table4-{data}-r110-channel",
            f"paper-{data}-r110-channel",
            suffix,
            ("table4", *channel_also),
            f"{net} channel pruned" + (", 2FC-after" if data == "c10" else ""),
            dense=f"table4-{data}-r110-dense",
        )
        for gated in (layer, channel):
            yield gated
            for control in controls(gated):
                yield replace(control, shown=("table4",) if data == "c10" else ("table4", "cifar100"))


def _table1(suffix: str) -> Iterator[Experiment]:
    yield _paper(
        "table1-c10-r56-dense",
        "paper-c10-r56-dense",
        suffix,
        ("table1", "figure2", "figure3"),
        "unpruned",
        kind="dense",
        seeds=FIVE,
    )
    yield _act_run("table1-c10-r56-ours", TABLE1["act_weight"], suffix, ("table1", "figure2", "figure3"), FIVE)


def _act_run(
    name: str, weight: float, suffix: str, shown: tuple[str, ...], seeds: tuple[int, ...] = THREE
) -> Experiment:
    """Layer gates with Gumbel-softmax, rising λ, and an activation loss."""
    settings = {**TABLE1, "act_weight": weight}
    label, without = f"ours, λ_act {weight:g}", "table1-c10-r56-dense"
    return _paper(name, "paper-c10-r56-layer", suffix, shown, label, settings, seeds=seeds, dense=without)


def _table6(suffix: str) -> Iterator[Experiment]:
    for weight in (0, 1, 2, 3):
        shown = ("table6", "figure6", *(("table5",) if weight == 3 else ()))
        yield _paper(
            f"table6-c10-r110-lambda-{weight}",
            "paper-c10-r110-layer",
            suffix,
            shown,
            f"λ {weight}" + (" (STE)" if weight == 3 else ""),
            {"polar_weight": float(weight), "polar_schedule": "constant"},
            dense="table4-c10-r110-dense",
        )


def _table3(suffix: str) -> Iterator[Experiment]:
    for layers, hidden in ((1, 0), (2, 16)):
        for position in ("before", "middle", "after"):
            if (layers, position) != (2, "after"):  # that one is Table 4's
                yield _paper(
                    f"table3-c10-r110-{layers}fc-{position}",
                    "paper-c10-r110-channel",
                    suffix,
                    ("table3",),
                    f"{layers}FC-{position}",
                    {"hidden": hidden, "position": position},
                    dense="table4-c10-r110-dense",
                )


def _table5(suffix: str) -> Iterator[Experiment]:
    """The paper's "Bernoulli" is a threshold at the batch's mean logit; the table also has a real Bernoulli sample."""
    estimators = {"gumbel": "Gumbel-softmax", "batch_mean": "batch mean, their Bernoulli", "bernoulli": "Bernoulli"}
    for estimator, label in estimators.items():
        yield _paper(
            f"table5-c10-r110-{estimator.replace('_', '-')}",
            "paper-c10-r110-layer",
            suffix,
            ("table5",),
            label,
            {"estimator": estimator, "polar_schedule": "constant"},
            dense="table4-c10-r110-dense",
        )


def _figures(suffix: str) -> Iterator[Experiment]:
    for weight in ACT_WEIGHTS:
        if weight != TABLE1["act_weight"]:
            name = f"figure2-c10-r56-act-{round(100 * weight):03d}"
            yield _act_run(name, weight, suffix, ("figure2", "figure3"))
    for kind, label in (("naive_dropout", "dropout"), ("naive_layer", "layers")):
        for share in PRUNED_SHARES:
            yield Experiment(
                f"figure2-c10-r56-naive-{label}-{share}{suffix}",
                kind,
                f"paper-c10-r56-dense{suffix}",
                {},
                FIVE,
                ("figure2",),
                f"naive {label} {share} %" + (", swapped" if suffix else ""),
                f"table1-c10-r56-dense{suffix}",
                share,
            )
