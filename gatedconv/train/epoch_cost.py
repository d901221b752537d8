"""The cost of an epoch: time, MACs and energy, those before a restart included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gatedconv.measure.energy import EnergyMeter
from gatedconv.train.distributed import Ranks
from gatedconv.train.metrics import Energy, added_energy, measured_energy, total_energy
from gatedconv.train.skip_dead import StepMacs

_NOTHING = {"seconds": 0.0, "core_seconds": 0.0, "executed": 0.0, "saved": 0.0}


class EpochCost:
    """Measures the present epoch.

    Args:
        counters: the MAC counters at work, that of the trained network first; they are counted from 0 in each epoch.
        ranks: the processes that train together; the figures are sums over them, the time that of this one.
        device: of this process.
        shared: other work runs on the device, so that its energy is unknown.
    """

    def __init__(
        self, counters: Callable[[], Sequence[StepMacs]], ranks: Ranks, device: torch.device, *, shared: bool
    ) -> None:
        self._counters, self._ranks, self._device = counters, ranks, device
        self._energy = EnergyMeter(device, host=ranks.local == 0, shared=shared)
        self._earlier, self._earlier_energy = dict(_NOTHING), Energy()  # of this epoch, before a restart
        self._started, self._cores_started = time.monotonic(), time.process_time()

    def start(self) -> None:
        """Begin the steps of an epoch, or those that are left of it."""
        self._started, self._cores_started = time.monotonic(), time.process_time()
        self._energy.start()

    def poll(self) -> None:
        """Read the energy counters, often enough that none restarts twice unseen."""
        self._energy.poll()

    def new_epoch(self) -> None:
        """Forget the epoch that is done."""
        self._earlier, self._earlier_energy = dict(_NOTHING), Energy()
        for counter in self._counters():
            counter.new_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The cost so far; a collective.

        Returns:
            "seconds", wall time; "core_seconds", time of all CPU cores; "executed" and "saved", MACs that the steps
            executed and skipped; "energy_j", None where it is unknown, "energy_reason" and "energy_source".
        """
        counters = self._counters()
        energy = added_energy(self._earlier_energy, total_energy(self._ranks.gather(measured_energy(self._energy))))
        return {
            "seconds": self._earlier["seconds"] + time.monotonic() - self._started,
            "core_seconds": self._sum("core_seconds", time.process_time() - self._cores_started),
            "executed": self._sum("executed", sum(counter.executed for counter in counters)),
            "saved": self._sum("saved", counters[0].saved),
            "energy_j": energy.joules,
            "energy_reason": energy.reason,
            "energy_source": energy.source,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an epoch from the cost so far."""
        self._earlier["seconds"] = state["seconds"]
        words = [str(state.get(name, "")) for name in ("energy_reason", "energy_source")]
        self._earlier_energy = Energy(state["energy_j"], *words)
        if self._ranks.main:  # the sums are those of all ranks
            self._earlier |= {name: state[name] for name in ("executed", "saved", "core_seconds")}

    def _sum(self, name: str, since: float) -> float:
        """A figure over all ranks: that before a restart, and that since."""
        value = torch.tensor(self._earlier[name] + since, dtype=torch.float64, device=self._device)
        return float(self._ranks.sum(value))
