"""Joules per image of the ledger's networks, measured when nothing else runs on the device."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gatedconv.environment import provenance
from reproduce.experiments import find_experiment
from reproduce.ledger import LedgerRow, amend_row, read_ledger
from reproduce.workplace import Key, Workplace

# Seconds beyond the deadline, for the runs that ended last: a later call may not have their weights.
_GRACE_S = 20.0


def measure_energy(workplace: Workplace, keys: Sequence[Key], failures: dict[Key, str]) -> None:
    """Add joules per image to the rows that lack them, for networks whose run folders are present.

    Args:
        workplace: of the ledger.
        keys: the runs; other rows stay unchanged.
        failures: receives the errors, by run.
    """
    rows = read_ledger(workplace.ledger)
    until = None if workplace.deadline is None else max(workplace.deadline, time.monotonic() + _GRACE_S)
    cache: dict[tuple[Any, ...], Any] = {}
    skipped: Counter[str] = Counter()
    for key in keys:
        row = rows.get(key)
        if row is None or row.energy_j_image is not None or not find_experiment(row.experiment).trains:
            continue
        if until is not None and time.monotonic() > until:
            skipped["time is up; continue with python -m reproduce energy NAME..."] += 1
            continue
        try:
            joules, reason = _measured(workplace, row, cache)
            if joules is None:
                skipped[reason] += 1
                continue
            amend_row(workplace.ledger, key, energy_j_image=joules)
            print(f"{row.experiment} seed {row.seed}: {joules:.3g} J per image", flush=True)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            failures[key] = f"energy per image: {error}"
    for reason, count in skipped.items():
        print(f"energy per image, {count} runs: not measured: {reason}", flush=True)


def _measured(workplace: Workplace, row: LedgerRow, cache: dict[tuple[Any, ...], Any]) -> tuple[float | None, str]:
    """Joules per image, or None and the reason; ``cache`` keeps the images of the last data source."""
    from gatedconv.deploy import load
    from gatedconv.measure.energy import EnergyMeter
    from gatedconv.train.build import load_images
    from gatedconv.train.device import place, resolve_device
    from gatedconv.train.summary import measure_energies

    folder = workplace.folder(row.experiment, row.seed)
    weights = folder.model("compact" if row.kind == "gated" else "dense")
    if not weights.is_file():
        return None, f"no {weights.name} in {folder.path}"
    config = workplace.here(folder.read_config())
    device = resolve_device(config.device)
    here = provenance(device)["device"]
    if here != row.device:
        return None, f"the run's device is {row.device}, not {here}"
    reason = EnergyMeter(device).reason
    if reason:
        return None, reason
    images = (config.data, config.evaluate_on, config.val_fraction, config.split_seed, config.image_size)
    if images not in cache:
        cache.clear()
        cache[images] = load_images(config)
    return measure_energies(place(load(weights), config).eval(), config, cache[images])[
        "energy_j_image"
    ], "not measurable"
