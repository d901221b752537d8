"""The stages by name: functions of a `Session` that yield `Case`s, the most telling first.

To add one, decorate it and name its module here. A module that is not there is a stage that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.session import Row, Session, text_of


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        key: benchmark, case, batch, dtype and provider of its row.
        seconds: that it may take; it is not begun with less time left.
        run: measures, and returns the row's other fields by name; what it raises becomes a row that says so.
    """

    key: tuple[str, str, int, str, str]
    seconds: float
    run: Callable[[], dict[str, Any]]


Stage = Callable[[Session], Iterator[Case]]

# Module, in the order in which `make gpu` runs them, and the stages in it.
MODULES = {
    "check": ("check",),
    "gates": ("bench-gates",),
    "training": ("bench-resnet56", "bench-resnet110"),
    "epochs": ("bench-epochs",),
    "check_train": ("check-train",),
    "engine": ("check-engine", "bench-engine-layers", "bench-engine-cifar", "bench-engine-imagenet"),
}
_stages: dict[str, tuple[Stage, str]] = {}


def stage(name: str, baseline: str = "") -> Callable[[Stage], Stage]:
    """Register a stage; its table says how much faster than the provider ``baseline`` each row is."""

    def register(function: Stage) -> Stage:
        if name in _stages:
            raise ValueError(f"stage {name!r} is registered twice")
        _stages[name] = function, baseline
        return function

    return register


def stage_names() -> list[str]:
    """Every stage, in the order in which `make gpu` runs them."""
    return [name for names in MODULES.values() for name in names]


def find_stage(name: str) -> tuple[Stage, str] | None:
    """A stage and its baseline; None where its module is not part of this checkout."""
    module = next(module for module, names in MODULES.items() if name in names)
    if importlib.util.find_spec(f"benchmarks.gpu.{module}") is None:
        return None
    importlib.import_module(f"benchmarks.gpu.{module}")
    return _stages.get(name)


def run_cases(session: Session, cases: Iterator[Case]) -> None:
    """Measure what there is time for; every row is on the disk before the next case begins.

    A case that an earlier run of the same commit measured is not measured again: a stage that ran out of time goes on.
    """
    for case in cases:
        if session.keep(case.key):
            continue
        if not session.has(case.seconds):
            session.skip(case.key)
            continue
        session.begin(case.key)
        try:
            row = Row(*case.key, **case.run())
        except Exception as error:  # whatever it is, the other cases can do without this one
            row = Row(*case.key, note=f"failed: {text_of(error)}")
        session.add(row)
