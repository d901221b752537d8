"""The stages by name: functions of a `Session`. To add one, decorate it and name its module here."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from benchmarks.gpu.session import Session

Stage = Callable[[Session], int]

_modules = ("check", "gates", "training")
_stages: dict[str, Stage] = {}


def stage(name: str) -> Callable[[Stage], Stage]:
    """Register a stage; it returns an exit code, 0 for success."""

    def register(function: Stage) -> Stage:
        if name in _stages:
            raise ValueError(f"stage {name!r} is registered twice")
        _stages[name] = function
        return function

    return register


def all_stages() -> dict[str, Stage]:
    """Every stage, in the order in which `make gpu` runs them."""
    for module in _modules:
        importlib.import_module(f"benchmarks.gpu.{module}")
    order = {f"benchmarks.gpu.{module}": i for i, module in enumerate(_modules)}
    return dict(sorted(_stages.items(), key=lambda item: order[item[1].__module__]))  # a stable sort
