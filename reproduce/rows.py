"""The ledger's rows: what they take from a finished run, and the hash of its recipe."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatedconv.environment import provenance
from gatedconv.train.config import FREE_ON_RESUME, field_specs, make_config
from gatedconv.train.metrics import run_energy
from gatedconv.train.run_dir import RunFolder
from reproduce.checks import known_images, require_macs
from reproduce.experiment import Experiment
from reproduce.experiments import all_experiments, find_experiment
from reproduce.ledger import LedgerRow
from reproduce.paper_presets import paper_settings
from reproduce.workplace import Key, Workplace, dataset_name


def recipe_settings(experiment: Experiment) -> dict[str, Any]:
    """The config fields that an experiment sets: its preset's, overridden by its own."""
    return (paper_settings(experiment.preset) if experiment.preset else {}) | dict(experiment.settings)


def recipe_of(experiment: Experiment) -> str:
    """A short hash of the present recipe, of its kind, and of the recipe of the run that it is derived from.

    Fields at their defaults do not count, so that a recipe keeps its hash when `TrainConfig` gets new ones. Seeds and
    fields that may change on resume do not count either; of the images the name counts, not the place.
    """
    config = make_config(recipe_settings(experiment), where=experiment.name)
    values: dict[str, Any] = {
        name: getattr(config, name)
        for name, spec in field_specs().items()
        if name not in FREE_ON_RESUME | {"seed"} and getattr(config, name) != spec.default
    }
    values["data"] = dataset_name(config.data)
    derived_from = "".join(recipe_of(find_experiment(name)) for name in experiment.sources)
    text = json.dumps([values, experiment.kind, experiment.share, derived_from], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def present_recipes() -> dict[str, str]:
    """`recipe_of` every experiment, by name."""
    return {name: recipe_of(experiment) for name, experiment in all_experiments().items()}


def require_present(row: LedgerRow) -> None:
    """Check that a row is of the present recipe of its experiment; a row without a recipe passes.

    Raises:
        ValueError: it is of another recipe.
    """
    now = recipe_of(find_experiment(row.experiment))
    if row.recipe not in (None, now):
        raise ValueError(
            f"the ledger has this run by another recipe ({row.recipe}, now {now}); to run it by this one, remove its "
            "line from the ledger and move its run folder away"
        )


def reference(experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> LedgerRow:
    """The row of the run that an experiment is derived from.

    Raises:
        ValueError: there is none, or it is of another recipe.
    """
    derived = f"{experiment.name}: is derived from {experiment.needs}, seed {seed}"
    row = rows.get((experiment.needs, seed))
    if row is None:
        raise ValueError(f"{derived}, which is not finished yet")
    try:
        require_present(row)
    except ValueError as error:
        raise ValueError(f"{derived}: {error}") from None
    return row


def training_row(
    experiment: Experiment,
    seed: int,
    folder: RunFolder,
    summary: Mapping[str, Any],
    rows: Mapping[Key, LedgerRow],
    jobs: int = 1,
) -> LedgerRow:
    """The ledger's row of a finished training.

    Raises:
        ValueError: the summary lacks a field, or has it in another form; or see `reference`, `require_macs`.
    """
    gated = experiment.kind == "gated"
    metrics = folder.read_metrics()
    energy = run_energy(metrics)
    source = reference(experiment, seed, rows) if experiment.needs and not gated else None
    try:
        net = summary["frozen" if gated else "dense"]
        macs_dense, macs_conv_dense = net["macs"], net.get("macs_conv")
        if gated:
            macs_dense, macs_conv_dense = summary["macs_dense"], summary.get("macs_conv_dense")
        elif source is not None:
            require_macs(experiment, net["macs"], source)
            macs_dense, macs_conv_dense = source.macs_dense, source.macs_conv_dense
        return LedgerRow(
            experiment=experiment.name,
            seed=seed,
            dataset=dataset_name(recipe_settings(experiment)["data"]),
            kind=experiment.kind,
            top1_last=net["top1"],
            macs=net["macs"],
            macs_dense=macs_dense,
            macs_conv=net.get("macs_conv"),
            macs_conv_dense=macs_conv_dense,
            epochs=sum(summary["epochs"].values()),
            params=net["params"],
            train_macs=summary.get("train_macs") or None,
            core_minutes=round(sum(line.core_seconds for line in metrics) / 60, 2) or None,
            energy_j=energy.joules,
            energy_reason=energy.reason or None,
            energy_j_image=net.get("energy_j_image"),
            jobs=jobs,
            recipe=recipe_of(experiment),
            amp=summary.get("amp", folder.read_config().amp),
            **{name: summary[name] for name in ("model", "device", "commit", "versions", "wall_s", "evaluated_on")},
            **(_of_gates(summary) if gated else {}),
        )
    except KeyError as error:
        raise ValueError(f"{folder.summary}: missing key {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder.summary}: {error}") from None


def _of_gates(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "open_ratio": summary["open_ratio"],
        "pruning_rate": summary["pruning_rate"],
        "polar": summary["polarization"],
        "agreement": summary["agreement"],
        "top1_dynamic": summary["dynamic"]["top1"],
        "macs_dynamic": summary["dynamic"]["macs"],
        "top1_teacher": summary["dense"]["top1"] if "dense" in summary else None,
    }


def naive_row(workplace: Workplace, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> LedgerRow:
    """The ledger's row of a naive baseline: a trained dense network with random parts left out."""
    from gatedconv.deploy import load
    from gatedconv.train.device import place, resolve_device
    from gatedconv.train.summary import evaluate_network
    from reproduce.naive import drop_layers, drop_parameters

    source = reference(experiment, seed, rows)
    started = time.monotonic()
    weights = workplace.find_weights(experiment.needs, seed)
    config = workplace.here(workplace.folder(experiment.needs, seed).read_config())
    dense: Any = load(weights)
    drop = drop_parameters if experiment.kind == "naive_dropout" else drop_layers
    pruned = drop(dense, experiment.share / 100, seed).eval()
    images = known_images(recipe_settings(experiment)["data"], config)
    found = evaluate_network(place(pruned, config), config, images)
    here = provenance(resolve_device(config.device))
    kept = found["params"] / sum(parameter.numel() for parameter in dense.parameters())
    unknown: dict[str, Any] = dict.fromkeys(
        ("train_macs", "core_minutes", "energy_j", "energy_reason", "energy_j_image")
    )
    return replace(
        source,
        experiment=experiment.name,
        kind=experiment.kind,
        top1_last=found["top1"],
        pruning_rate=experiment.share / 100 if experiment.kind == "naive_dropout" else 1 - kept,
        epochs=0,
        wall_s=round(time.monotonic() - started, 2),
        jobs=workplace.other_runs + 1,
        recipe=recipe_of(experiment),
        **{name: found[name] for name in ("macs", "macs_conv", "params")},
        **{name: here[name] for name in ("device", "commit", "versions")},
        **unknown,
    )
