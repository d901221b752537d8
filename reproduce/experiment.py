"""One row of the experiment table, and the controls that a gated run has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Settings = Mapping[str, Any]
THREE, FIVE = (0, 1, 2), (0, 1, 2, 3, 4)  # seeds


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
        taught_by: the experiment whose dense network, of the same seed, teaches it unchanged.
        dense: the experiment of the same network without gates, by the same recipe; "" for none.
    """

    name: str
    kind: str
    preset: str = ""
    settings: Settings = field(default_factory=dict)
    seeds: tuple[int, ...] = THREE
    shown: tuple[str, ...] = ()
    label: str = ""
    needs: str = ""
    share: int = 0
    taught_by: str = ""
    dense: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """The experiments whose runs come before its own."""
        return tuple(name for name in (self.needs, self.taught_by) if name)

    @property
    def trains(self) -> bool:
        """Whether it trains; naive baselines only evaluate a trained network."""
        return not self.kind.startswith("naive")


def controls(gated: Experiment) -> tuple[Experiment, Experiment]:
    """The networks that a gated run has to beat: a dense one of equal MACs, and its own sub-network fixed at epoch 0.

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


def taught(fixed: Experiment, gated: Experiment) -> Experiment:
    """The control at its strongest: a dense teacher trains with it from the start, as with the gated network."""
    settings = {name: value for name, value in fixed.settings.items() if name != "teacher_at"}
    settings |= {name: value for name, value in gated.settings.items() if name == "teacher_at"}
    return replace(fixed, name=f"{fixed.name}-taught", settings=settings, label=f"{fixed.label}, taught")


def with_controls(
    name: str, preset: str, shown: str, seeds: tuple[int, ...] = THREE, settings: Settings | None = None
) -> Iterator[Experiment]:
    """A gated run, its dense network and its controls, the second of them also with a teacher."""
    label, without = f"{network_label(name)} gated", f"{name}-dense"
    gated = Experiment(name, "gated", preset, settings or {}, seeds, (shown,), label, dense=without)
    yield gated
    yield dense(gated)
    even, fixed = controls(gated)
    yield from (even, fixed, taught(fixed, gated))


def dense(gated: Experiment) -> Experiment:
    """The experiment that `gated.dense` names."""
    settings = {**gated.settings, "gate": "none", "consensus_at": 1.0, "mac_control": "none", "teacher_at": 1.0}
    label = f"{network_label(gated.name)} dense"
    return replace(gated, name=gated.dense, kind="dense", settings=settings, label=label, dense="")


def network_label(name: str) -> str:
    """headline-r56-c10 -> ResNet-56 CIFAR-10; fast-c10 -> VGG CIFAR-10."""
    parts = name.split("-")
    depth = next((part[1:] for part in parts if part[:1] == "r" and part[1:].isdigit()), "")
    data = next(part[1:] for part in parts if part[:1] == "c" and part[1:].isdigit())
    return f"ResNet-{depth} CIFAR-{data}" if depth else f"VGG CIFAR-{data}"
