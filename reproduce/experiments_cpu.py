"""The small rows: the 16x16 bench, the network that trains in minutes, and short trainings, most for two CPU cores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from reproduce.experiment import (
    FIVE,
    THREE,
    Experiment,
    Settings,
    controls,
    dense,
    network_label,
    taught,
    with_controls,
)
from reproduce.paper_presets import TABLE1

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
_LABELS = {"recipe, the teacher's word for nearly all": "recipe, teacher weight 0.9"}  # the name is the ledger's
# One seed did not decide when the consensus should come.
_OF_THREE_SEEDS = ("no teacher", "early consensus", "late consensus")


def cpu_bench() -> Iterator[Experiment]:
    """The 16x16 bench: the recipe with its controls and its ablations."""
    yield from with_controls("cpu-r20-c10", "best-c10-r20", "cpu", FIVE, _CPU_BENCH)
    for name, change, label in (
        ("cpu-untaught-r20-c10", {}, "no teacher"),
        ("cpu-early-r20-c10", _EARLY, "no teacher, most gates early"),
    ):
        label = f"{network_label(name)} gated, {label}"
        settings = {**_CPU_BENCH, "teacher_at": 1.0, **change}
        without = "cpu-r20-c10-dense"
        other = Experiment(name, "gated", "best-c10-r20", settings, shown=("cpu",), label=label, dense=without)
        yield from (other, controls(other)[1])
    for name, change in _ABLATIONS.items():
        settings = {**_CPU_BENCH, "teacher_at": 1.0, "evaluate_on": "val", **change}
        slug = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in name).split()).lower()
        seeds = THREE if name in _OF_THREE_SEEDS else (0,)
        label = _LABELS.get(name, name)
        yield Experiment(
            f"cpu-r20-c10-ablation-{slug}", "gated", "best-c10-r20", settings, seeds, ("ablations",), label
        )


# On two AVX-512 cores with other work on them, two threads take 4 to 7 times as long as one for the weight gradients
# of bf16 convolutions of 256 channels: oneDNN's threads spin while they wait for each other.
_HERE: Settings = {"threads": 1, "latency": False}


def fast() -> Iterator[Experiment]:
    """The network that trains in minutes, at 50 and 30 % of the MACs, without a teacher and with one."""
    for name, data, target, seeds in (
        ("fast-c10", "cifar10", 0.5, FIVE),
        ("fast-c10-30", "cifar10", 0.3, THREE),
        ("fast-c100", "cifar100", 0.5, THREE),
    ):
        shown = "fast30" if target == 0.3 else name.replace("-", "")
        own = {**_HERE, "data": data, "mac_target": target}
        label, teacher = f"{network_label(name)} gated", "fast-c10-dense" if data == "cifar10" else f"{name}-dense"
        gated = Experiment(name, "gated", "fast-c10", own, seeds, (shown,), label, dense=teacher)
        even, fixed = controls(gated)
        with_teacher = replace(
            gated,
            name=f"{name}-taught",
            settings={**own, "teacher_at": 0.3},
            label=f"{network_label(name)} gated, taught",
        )
        yield from (gated, even, fixed, with_teacher, taught(controls(with_teacher)[1], with_teacher))
        if target == 0.5:
            yield dense(gated)
        before = replace(
            controls(with_teacher)[0],
            name=f"{name}-taught-before",
            kind="taught_before",
            label=f"{with_teacher.label}, equal MACs, taught by the dense network trained before",
            taught_by=teacher,
        )
        yield replace(before, settings={**before.settings, "teacher_at": 0.0})


def few_epochs() -> Iterator[Experiment]:
    """The paper's networks in as many epochs as two cores can afford: schedules keep their shares of the run."""
    for name, preset, epochs, shown in (
        ("epochs40-r56-c10", "best-c10-r56", 40, "epochs40"),
        ("epochs60-r20-c10", "best-c10-r20", 60, "epochs60"),
        ("epochs60-r20-c100", "best-c100-r20", 60, "epochs60c100"),
    ):
        yield from with_controls(name, preset, shown, settings={**_HERE, "epochs": epochs, "warmup_epochs": 1.0})
    for gate, suffix, label, more in (
        ("dense", "", "unpruned", {}),
        ("layer", "", "layer gates, λ rising", {}),
        ("channel", "", "channel gates, λ rising", {}),
        ("layer", "-act", "as in Table 1: layer gates, Gumbel-softmax, λ rising, λ_act 0.5", TABLE1),
    ):
        kind = "dense" if gate == "dense" else "gated"
        name, preset = f"epochs40-r56-c10-paper-{gate}{suffix}", f"paper-c10-r56-{gate}-swapped"
        settings = {**_HERE, "epochs": 40, "amp": "auto", **more}
        without = "epochs40-r56-c10-paper-dense" if kind == "gated" else ""
        yield Experiment(name, kind, preset, settings, THREE, ("epochs40",), f"the paper: {label}", dense=without)
    small = {**_HERE, "epochs": 30, "amp": "auto", "model": "resnet20"}
    for estimator, label in (
        ("ste", "STE, λ 3"),
        ("gumbel", "Gumbel-softmax"),
        ("batch_mean", "batch mean, their Bernoulli"),
    ):
        name, settings = f"small5-r20-c10-{estimator.replace('_', '-')}", {"estimator": estimator}
        settings |= {"polar_schedule": "constant"}
        yield Experiment(
            name,
            "gated",
            "paper-c10-r56-layer-swapped",
            {**small, **settings},
            (0,),
            ("small5", *(("small6",) if estimator == "ste" else ())),
            label,
        )
    for weight in (0, 1, 2, 3):
        name, label = f"small6-r20-c10-lambda-{weight}", f"λ {weight}"
        of_weight = {**small, "polar_weight": float(weight), "polar_schedule": "constant"}
        if weight == 3:  # that one is the table of estimators' STE
            name, label, of_weight = "small6-r20-c10-lambda-rising", "λ rising", small
        yield Experiment(name, "gated", "paper-c10-r56-layer-swapped", of_weight, (0,), ("small6",), label)
