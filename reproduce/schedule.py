"""Plans: the runs of the experiment table in the order of what an hour buys, on a CPU and on a GPU."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from reproduce.experiment import THREE
from reproduce.experiments import all_experiments
from reproduce.ledger import LedgerRow
from reproduce.workplace import Key, Workplace


@dataclass(frozen=True)
class PlanPart:
    """Runs that answer a question together.

    Attributes:
        question: its letter, or its title, in docs/results.md.
        names: experiments, or patterns; all of the first, then all of the next.
        seeds: one after the other; those that an experiment does not have are left out.
    """

    question: str
    names: tuple[str, ...]
    seeds: tuple[int, ...] = THREE


_FAST = ("", "-dense", "-equal-macs", "-fixed-at-init", "-taught", "-taught-fixed-at-init-taught", "-taught-before")
_ONE, _MORE = (0,), (1, 2)


def _fast(name: str) -> tuple[str, ...]:
    return tuple(name + suffix for suffix in _FAST)


PLANS: Mapping[str, tuple[PlanPart, ...]] = MappingProxyType(
    {
        "cpu": (
            PlanPart("a", ("fast-c10-dense", *_fast("fast-c10")), _ONE),
            PlanPart("b", ("epochs40-r56-c10-paper-*", "epochs40-r56-c10", "epochs40-r56-c10-dense"), _ONE),
            PlanPart("c", ("epochs60-r20-c10", "epochs60-r20-c10-*"), _ONE),
            PlanPart("a", _fast("fast-c10"), (1, 2, 3, 4)),
            PlanPart("a, 30 %", _fast("fast-c10-30")),
            PlanPart("c", ("epochs60-r20-c10", "epochs60-r20-c10-*"), _MORE),
            PlanPart("d", (*_fast("fast-c100"), "epochs60-r20-c100", "epochs60-r20-c100-*")),
            PlanPart("b", ("epochs40-r56-c10", "epochs40-r56-c10-*"), (0, *_MORE)),
            PlanPart("e", ("small5-*", "small6-*"), _ONE),
        ),
        "gpu": (
            PlanPart("headline", ("headline-*",), (0, 1, 2, 3, 4)),
            PlanPart("the paper's tables", ("table4-*", "table1-*", "table6-*", "table3-*", "table5-*", "figure2-*")),
            PlanPart("other recipes", ("ours-*",)),
        ),
    }
)


def planned(name: str) -> dict[Key, str]:
    """The runs of a plan in order, and the question that each answers.

    Raises:
        ValueError: no plan of that name.
    """
    if name not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {name!r}")
    known, found = all_experiments(), dict[Key, str]()
    for part in PLANS[name]:
        for seed in part.seeds:
            for pattern in part.names:
                for each in fnmatch.filter(known, pattern):
                    if seed in known[each].seeds:
                        found.setdefault((each, seed), part.question)
    return found


def status(workplace: Workplace, key: Key, rows: Mapping[Key, LedgerRow]) -> str:
    """How far a run is: its accuracy and cost, the epochs done, or "not begun"."""
    row = rows.get(key)
    if row is not None:
        minutes = "" if row.core_minutes is None else f" in {row.core_minutes:.0f} core-minutes"
        return f"done: {row.top1_last:.2f} %{minutes}"
    folder = workplace.folder(*key)
    if not folder.holds_run():
        return "not begun"
    try:
        done = len(folder.read_metrics())
    except ValueError:
        done = 0
    return f"{done} of {folder.read_config().epochs} epochs done"
