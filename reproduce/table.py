"""The experiment table: every run of the paper's tables and figures, our recipes, and their controls.

Ordered by what a GPU minute buys. Nothing here runs anything; `reproduce.runner` does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any

Settings = Mapping[str, Any]

PRUNED_SHARES = (20, 30, 50, 60, 80)  # percent, of the naive baselines
ACT_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # λ_act of Figures 2 and 3, in [0, 1]; not printed in the paper
TABLE1_ACT_WEIGHT = 0.5  # of "Ours", not printed either
_THREE, _FIVE = (0, 1, 2), (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Experiment:
    """One row of the table.

    Attributes:
        name: as `python -m reproduce run` takes it.
        kind: one of `ledger.KINDS`.
        preset: named settings to start from; "" for the defaults.
        settings: config fields that override the preset.
        seeds: one run each.
        shown: the tables and figures of docs/results.md that it belongs to.
        label: its name in them.
        needs: for controls and naive baselines, the experiment whose run of the same seed they are derived from.
        share: percent that a naive baseline prunes.
    """

    name: str
    kind: str
    preset: str = ""
    settings: Settings = field(default_factory=dict)
    seeds: tuple[int, ...] = _THREE
    shown: tuple[str, ...] = ()
    label: str = ""
    needs: str = ""
    share: int = 0

    @property
    def trains(self) -> bool:
        """Whether it trains; naive baselines only evaluate a trained network."""
        return not self.kind.startswith("naive")


@cache
def all_experiments() -> Mapping[str, Experiment]:
    """Every experiment by name, in table order; read-only."""
    found: dict[str, Experiment] = {}
    for experiment in (
        *_with_controls("headline-r56-c10", "best-c10-r56", "headline", _FIVE),
        *_table4(),
        *_table1(),
        *_with_controls("ours-r56-c100", "best-c100-r56", "cifar100"),
        *_with_controls("ours-r110-c100", "best-c100-r110", "cifar100"),
        *_table6(),
        *_table3(),
        *_table5(),
        *_figures(),
        *_with_controls("ours-r110-c10", "best-c10-r110", "recipes"),
        *(
            row
            for depth in (20, 32, 44)
            for row in _with_controls(f"ours-r{depth}-c10", f"best-c10-r{depth}", "recipes")
        ),
        *_cpu_bench(),
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


def controls(gated: Experiment) -> tuple[Experiment, Experiment]:
    """What a gated run has to beat: a dense network of equal MACs, and its own sub-network fixed at epoch 0.

    Both train by the same recipe and for as many epochs, without a teacher. The first keeps the same share of every
    gate.
    """
    without_gates = {"consensus_at": 1.0, "mac_control": "none", "teacher_at": 1.0}
    settings = {**gated.settings, **without_gates, "subnetwork": "even"}
    common = replace(gated, settings=settings, needs=gated.name)
    even, fixed = f"{gated.label}, equal MACs", f"{gated.label}, fixed at epoch 0"
    name = gated.name.removesuffix("-swapped")
    suffix = gated.name.removeprefix(name)  # at the end, so that the pattern *-swapped selects one reading
    return (
        replace(common, name=f"{name}-equal-macs{suffix}", kind="equal_macs", label=even),
        replace(common, name=f"{name}-fixed-at-init{suffix}", kind="fixed_at_init", label=fixed),
    )


def _taught(fixed: Experiment) -> Experiment:
    """The control at its strongest: a dense teacher trains with it from the start, as with the gated network."""
    settings = {name: value for name, value in fixed.settings.items() if name != "teacher_at"}
    return replace(fixed, name=f"{fixed.name}-taught", settings=settings, label=f"{fixed.label}, taught")


def _with_controls(
    name: str, preset: str, shown: str, seeds: tuple[int, ...] = _THREE, settings: Settings | None = None
) -> Iterator[Experiment]:
    """A gated run, its dense network and its controls, the second of them also with a teacher."""
    gated = Experiment(name, "gated", preset, settings or {}, seeds, (shown,), f"{_net(name)} gated")
    yield gated
    yield _dense(gated, f"{name}-dense")
    even, fixed = controls(gated)
    yield from (even, fixed, _taught(fixed))


def _dense(gated: Experiment, name: str) -> Experiment:
    settings = {**gated.settings, "gate": "none", "consensus_at": 1.0, "mac_control": "none", "teacher_at": 1.0}
    return replace(gated, name=name, kind="dense", settings=settings, label=f"{_net(gated.name)} dense")


def _net(name: str) -> str:
    """headline-r56-c10 -> ResNet-56 CIFAR-10."""
    parts = name.split("-")
    depth = next(part[1:] for part in parts if part[:1] == "r" and part[1:].isdigit())
    data = next(part[1:] for part in parts if part[:1] == "c" and part[1:].isdigit())
    return f"ResNet-{depth} CIFAR-{data}"


def _readings(make: Any) -> Iterator[Experiment]:
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
    seeds: tuple[int, ...] = _THREE,
) -> Experiment:
    label = label + (", swapped" if suffix else "")
    return Experiment(name + suffix, kind, preset + suffix, settings or {}, seeds, shown, label)


def _table4() -> Iterator[Experiment]:
    def rows(suffix: str) -> Iterator[Experiment]:
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
            )
            channel_also = ("table3",) if data == "c10" else ("cifar100",)
            channel = _paper(
                f"table4-{data}-r110-channel",
                f"paper-{data}-r110-channel",
                suffix,
                ("table4", *channel_also),
                f"{net} channel pruned" + (", 2FC-after" if data == "c10" else ""),
            )
            for gated in (layer, channel):
                yield gated
                for control in controls(gated):
                    yield replace(control, shown=("table4",) if data == "c10" else ("table4", "cifar100"))

    return _readings(rows)


def _table1() -> Iterator[Experiment]:
    def rows(suffix: str) -> Iterator[Experiment]:
        yield _paper(
            "table1-c10-r56-dense",
            "paper-c10-r56-dense",
            suffix,
            ("table1", "figure2", "figure3"),
            "unpruned",
            kind="dense",
            seeds=_FIVE,
        )
        yield _act_run("table1-c10-r56-ours", TABLE1_ACT_WEIGHT, suffix, ("table1", "figure2", "figure3"), _FIVE)

    return _readings(rows)


def _act_run(
    name: str, weight: float, suffix: str, shown: tuple[str, ...], seeds: tuple[int, ...] = _THREE
) -> Experiment:
    """Layer gates with Gumbel-softmax, rising λ, and an activation loss."""
    settings = {"estimator": "gumbel", "act_weight": weight}
    return _paper(name, "paper-c10-r56-layer", suffix, shown, f"ours, λ_act {weight:g}", settings, seeds=seeds)


def _table6() -> Iterator[Experiment]:
    def rows(suffix: str) -> Iterator[Experiment]:
        for weight in (0, 1, 2, 3):
            shown = ("table6", "figure6", *(("table5",) if weight == 3 else ()))
            yield _paper(
                f"table6-c10-r110-lambda-{weight}",
                "paper-c10-r110-layer",
                suffix,
                shown,
                f"λ {weight}" + (" (STE)" if weight == 3 else ""),
                {"polar_weight": float(weight), "polar_schedule": "constant"},
            )

    return _readings(rows)


def _table3() -> Iterator[Experiment]:
    def rows(suffix: str) -> Iterator[Experiment]:
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
                    )

    return _readings(rows)


def _table5() -> Iterator[Experiment]:
    """The paper's "Bernoulli" is a threshold at the batch's mean logit; the table also has a real Bernoulli sample."""

    def rows(suffix: str) -> Iterator[Experiment]:
        estimators = {"gumbel": "Gumbel-softmax", "batch_mean": "batch mean, their Bernoulli", "bernoulli": "Bernoulli"}
        for estimator, label in estimators.items():
            yield _paper(
                f"table5-c10-r110-{estimator.replace('_', '-')}",
                "paper-c10-r110-layer",
                suffix,
                ("table5",),
                label,
                {"estimator": estimator, "polar_schedule": "constant"},
            )

    return _readings(rows)


def _figures() -> Iterator[Experiment]:
    def rows(suffix: str) -> Iterator[Experiment]:
        for weight in ACT_WEIGHTS:
            if weight != TABLE1_ACT_WEIGHT:
                name = f"figure2-c10-r56-act-{round(100 * weight):03d}"
                yield _act_run(name, weight, suffix, ("figure2", "figure3"))
        for kind, label in (("naive_dropout", "dropout"), ("naive_layer", "layers")):
            for share in PRUNED_SHARES:
                yield Experiment(
                    f"figure2-c10-r56-naive-{label}-{share}{suffix}",
                    kind,
                    f"paper-c10-r56-dense{suffix}",
                    {},
                    _FIVE,
                    ("figure2",),
                    f"naive {label} {share} %" + (", swapped" if suffix else ""),
                    f"table1-c10-r56-dense{suffix}",
                    share,
                )

    return _readings(rows)


# ResNet-20 on 25,000 CIFAR-10 images averaged to 16x16: what two CPU cores can afford.
_CPU_BENCH: Settings = {
    "data": "npz:cifar10-16x16-25k.npz",
    "model": "resnet20",
    "epochs": 24,
    "warmup_epochs": 1.0,
    "amp": "bf16",
    "threads": 1,
    "latency": False,
    "device": "cpu",
    "mac_target": 0.5,
}
_EARLY: Settings = {"mac_ramp": (0.125, 0.6), "mac_ramp_power": 3.0, "consensus_at": 0.625}
_TAUGHT: Settings = {"teacher_at": 0.2}
# Each changes one factor of the recipe, with one seed, evaluated on 15,000 held-out CIFAR-10 training images. Those of
# the gates run without a teacher, which would double their cost; the last two are of the teacher.
_ABLATIONS: dict[str, Settings] = {
    "no teacher": {},
    "most gates early": _EARLY,
    "most gates early, the same share of each": {**_EARLY, "mac_rank": "each"},
    "early consensus": {"mac_ramp": (0.08, 0.4), "consensus_at": 0.4167},
    "late consensus": {"mac_ramp": (0.3, 0.85), "consensus_at": 0.875},
    "at once, by Fisher information": {"mac_control": "none", "consensus_at": 0.5, "consensus_by": "fisher"},
    "a price on the MACs": {
        "mac_control": "price",
        "mac_ramp": (0.15, 0.45),
        "consensus_at": 0.5,
        "consensus_by": "logit",
    },
    "a fixed weight on the MACs": {"mac_control": "none", "mac_weight": 4.0, "gate_warmup": 0.3, "consensus_at": 1.0},
    "gates start undecided": {"gate_bias": 0.0},
    "polarization warmed up": {"polar_schedule": "warmup", "gate_warmup": 0.3},
    "gates decay": {"gate_weight_decay": 5e-4},
    "running BatchNorm statistics": {"bn_reestimate": False},
    "recipe": _TAUGHT,
    "recipe, the teacher's word for nearly all": {**_TAUGHT, "teacher_weight": 0.9},
}
# One seed did not decide when the consensus should come.
_OF_THREE_SEEDS = ("no teacher", "early consensus", "late consensus")


def _cpu_bench() -> Iterator[Experiment]:
    yield from _with_controls("cpu-r20-c10", "best-c10-r20", "cpu", _FIVE, _CPU_BENCH)
    for name, change, label in (
        ("cpu-untaught-r20-c10", {}, "no teacher"),
        ("cpu-early-r20-c10", _EARLY, "no teacher, most gates early"),
    ):
        label = f"{_net(name)} gated, {label}"
        settings = {**_CPU_BENCH, "teacher_at": 1.0, **change}
        other = Experiment(name, "gated", "best-c10-r20", settings, shown=("cpu",), label=label)
        yield from (other, controls(other)[1])
    for name, change in _ABLATIONS.items():
        settings = {**_CPU_BENCH, "teacher_at": 1.0, "evaluate_on": "val", **change}
        slug = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in name).split()).lower()
        seeds = _THREE if name in _OF_THREE_SEEDS else (0,)
        yield Experiment(f"cpu-r20-c10-ablation-{slug}", "gated", "best-c10-r20", settings, seeds, ("ablations",), name)
