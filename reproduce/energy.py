"""Joules per image of the ledger's networks, measured when nothing else runs on the device."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from reproduce.files import Bench, Key
from reproduce.ledger import LedgerRow, amend_row, read_ledger
from reproduce.table import find_experiment

# Beyond the deadline: networks of the runs that ended last, a few seconds each; a later call may lack their weights.
_GRACE_S = 20.0


def measure_energy(bench: Bench, keys: Sequence[Key], failures: dict[Key, str]) -> None:
    """Put joules per image into the rows that lack them, of networks whose run folders are here.

    Args:
        bench: whose ledger it is.
        keys: the runs; others are left as they are.
        failures: gets what went wrong, by run.
    """
    rows = read_ledger(bench.ledger)
    until = None if bench.deadline is None else max(bench.deadline, time.monotonic() + _GRACE_S)
    seen: dict[tuple[Any, ...], Any] = {}
    silent: Counter[str] = Counter()
    for key in keys:
        row = rows.get(key)
        if row is None or row.energy_j_image is not None or not find_experiment(row.experiment).trains:
            continue
        if until is not None and time.monotonic() > until:
            silent["time is up; gatedconv report energy NAME... goes on"] += 1
            continue
        try:
            joules, reason = _measured(bench, row, seen)
            if joules is None:
                silent[reason] += 1
                continue
            amend_row(bench.ledger, key, energy_j_image=joules)
            print(f"{row.experiment} seed {row.seed}: {joules:.3g} J of an image", flush=True)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            failures[key] = f"energy of an image: {error}"
    for reason, count in silent.items():
        print(f"energy of an image, {count} runs: not measured: {reason}", flush=True)


def _measured(bench: Bench, row: LedgerRow, seen: dict[tuple[Any, ...], Any]) -> tuple[float | None, str]:
    """Joules of an image, or why there are none; ``seen`` keeps images that several networks are asked about."""
    from gatedconv.deploy import load
    from gatedconv.environment import provenance
    from gatedconv.measure.energy import EnergyMeter
    from gatedconv.train.build import load_images
    from gatedconv.train.finish import energies
    from gatedconv.train.recipe import place, resolve_device

    folder = bench.folder(row.experiment, row.seed)
    weights = folder.model("compact" if row.kind == "gated" else "dense")
    if not weights.is_file():
        return None, f"no {weights.name} in {folder.path}"
    config = bench.here(folder.read_config())
    device = resolve_device(config.device)
    here = provenance(device)["device"]
    if here != row.device:
        return None, f"the run's device is {row.device}, not {here}"
    reason = EnergyMeter(device).reason
    if reason:
        return None, reason
    images = (config.data, config.evaluate_on, config.val_fraction, config.split_seed, config.image_size)
    if images not in seen:
        seen.clear()
        seen[images] = load_images(config)
    return energies(place(load(weights), config).eval(), config, seen[images])["energy_j_image"], "not measurable"
