"""The energy of epochs and runs: sums over processes, restarts and epochs, and why a sum is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from gatedconv.measure.energy import EnergyMeter
from gatedconv.train.metrics import EpochMetrics

_THEN = "; then "  # between devices that were measured one after the other


@dataclass(frozen=True)
class Energy:
    """Joules; where they are None, the reason; and the names of the measured devices."""

    joules: float | None = 0.0
    reason: str = ""
    source: str = ""


def measured_energy(meter: EnergyMeter) -> Energy:
    """Energy of this process since its meter was started; 0 for a device that another rank measures."""
    if meter.elsewhere:
        return Energy()
    joules = meter.joules()
    return Energy(joules, meter.reason, meter.source)


def total_energy(parts: Sequence[Energy]) -> Energy:
    """The energy of all processes: None where one of them has no counter."""
    names = Counter(name for part in parts for name in part.source.split(", ") if name)
    source = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    return Energy(_sum(part.joules for part in parts), _first(part.reason for part in parts), source)


def added_energy(earlier: Energy, now: Energy) -> Energy:
    """The energy before and after a restart, or of one epoch after the other; each device is named once."""
    sources = [*earlier.source.split(_THEN), *now.source.split(_THEN)]
    source = _THEN.join(dict.fromkeys(source for source in sources if source))
    return Energy(_sum([earlier.joules, now.joules]), _first([earlier.reason, now.reason]), source)


def run_energy(history: Sequence[EpochMetrics]) -> Energy:
    """The energy of all epochs: None, with the first reason, where one of them was not measured."""
    if not history:
        return Energy(None, "no epoch was measured")
    epochs = (Energy(line.energy_j, line.energy_reason, line.energy_source) for line in history)
    total = reduce(added_energy, epochs)
    if total.joules is not None:
        return replace(total, joules=round(total.joules, 3), reason="")
    silent = _first(f"{line.phase}, epoch {line.epoch}: not measured" for line in history if line.energy_j is None)
    return replace(total, reason=total.reason or silent)


def _sum(joules: Iterable[float | None]) -> float | None:
    total = 0.0
    for each in joules:
        if each is None:
            return None
        total += each
    return total


def _first(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")
