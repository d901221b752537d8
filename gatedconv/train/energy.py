"""The joules of an epoch: what the counters of all processes tell together, or why they do not tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gatedconv.measure.energy import EnergyMeter
from gatedconv.train.metrics import EpochMetrics


@dataclass(frozen=True)
class Energy:
    """Joules, None where they are not known, and then why; and the devices that are counted, for people."""

    joules: float | None = 0.0
    reason: str = ""
    source: str = ""


def spent(meter: EnergyMeter) -> Energy:
    """What a process has to tell of the time since its meter was started; of what another one counts, nothing."""
    if meter.elsewhere:
        return Energy()
    joules = meter.joules()
    return Energy(joules, meter.reason, meter.source)


def joined(parts: Sequence[Energy]) -> Energy:
    """The energy of all processes together: unknown where one of them cannot tell."""
    names = Counter(name for part in parts for name in part.source.split(", ") if name)
    source = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    return Energy(_sum(part.joules for part in parts), _first(part.reason for part in parts), source)


def continued(earlier: Energy, now: Energy) -> Energy:
    """The energy of two times of an epoch, before and after a restart."""
    source = one_after_another([earlier.source, now.source])
    return Energy(_sum([earlier.joules, now.joules]), _first([earlier.reason, now.reason]), source)


def of_run(history: Sequence[EpochMetrics]) -> Energy:
    """The energy of all epochs: unknown, with the first reason, where one of them could not be measured."""
    joules = _sum(line.energy_j for line in history) if history else None
    source = one_after_another(line.energy_source for line in history)
    if joules is not None:
        return Energy(round(joules, 3), "", source)
    reason = _first(line.energy_reason for line in history)
    silent = [f"{line.phase}, epoch {line.epoch}: not measured" for line in history if line.energy_j is None]
    return Energy(None, reason or _first(silent) or "no epoch was measured", source)


def one_after_another(sources: Iterable[str]) -> str:
    """Devices that were counted in turns, each once, in order."""
    return "; then ".join(dict.fromkeys(source for source in sources if source))


def _sum(joules: Iterable[float | None]) -> float | None:
    total = 0.0
    for each in joules:
        if each is None:
            return None
        total += each
    return total


def _first(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")
