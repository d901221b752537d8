"""The ledger's rows: what is taken from a finished run, and which recipe it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatedconv.train.config import FREE_ON_RESUME, field_specs, make_config
from gatedconv.train.energy import of_run
from gatedconv.train.folder import RunFolder
from gatedconv.train.presets import preset_settings
from gatedconv.train.record import NUMBER, Form, require_form
from reproduce.checks import known_images, require_macs
from reproduce.files import Bench, Key, dataset_name, find_weights
from reproduce.ledger import LedgerError, LedgerRow
from reproduce.table import Experiment, all_experiments, find_experiment

_NET: Form = {"top1": NUMBER, "macs": NUMBER, "params": int}
_SUMMARY: dict[str, Form] = {
    "model": str, "epochs": dict, "device": str, "commit": (str, type(None)), "versions": dict, "wall_s": NUMBER,
    "evaluated_on": str,
}  # fmt: skip
_GATES: dict[str, Form] = {
    "frozen": _NET, "macs_dense": NUMBER, "open_ratio": NUMBER, "pruning_rate": NUMBER, "polarization": NUMBER,
    "agreement": NUMBER, "dynamic": {"top1": NUMBER, "macs": NUMBER},
}  # fmt: skip


def recipe_settings(experiment: Experiment) -> dict[str, Any]:
    """The fields that an experiment sets: its preset's, and its own over those."""
    return (preset_settings(experiment.preset) if experiment.preset else {}) | dict(experiment.settings)


def recipe_of(experiment: Experiment) -> str:
    """A short hash of the recipe as the table has it now, of its kind, and of what the run is made from.

    Fields at their defaults do not count, so that a recipe keeps its hash when `TrainConfig` gets new ones. Neither
    do seeds and what is free to change on resume; of the images their name counts, not their place.
    """
    config = make_config(recipe_settings(experiment), where=experiment.name)
    told: dict[str, Any] = {
        name: getattr(config, name)
        for name, spec in field_specs().items()
        if name not in FREE_ON_RESUME | {"seed"} and getattr(config, name) != spec.default
    }
    told["data"] = dataset_name(config.data)
    made_from = recipe_of(find_experiment(experiment.needs)) if experiment.needs else ""
    text = json.dumps([told, experiment.kind, experiment.share, made_from], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def present_recipes() -> dict[str, str]:
    """`recipe_of` every experiment, by name."""
    return {name: recipe_of(experiment) for name, experiment in all_experiments().items()}


def require_present(row: LedgerRow) -> None:
    """Check that a row is of the recipe that its experiment has now; a row that tells none may be.

    Raises:
        ValueError: it is of another; says what to do.
    """
    now = recipe_of(find_experiment(row.experiment))
    if row.recipe not in (None, now):
        raise ValueError(
            f"the ledger has this run by another recipe ({row.recipe}, now {now}); to run it by this one, take its "
            "line out of the ledger and move its run folder away"
        )


def reference(experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> LedgerRow:
    """The row of the run that an experiment is made from.

    Raises:
        ValueError: there is none, or it is of another recipe.
    """
    made_from = f"{experiment.name}: is made from {experiment.needs}, seed {seed}"
    row = rows.get((experiment.needs, seed))
    if row is None:
        raise ValueError(f"{made_from}, which is not finished yet")
    try:
        require_present(row)
    except ValueError as error:
        raise ValueError(f"{made_from}: {error}") from None
    return row


def training_row(
    experiment: Experiment, seed: int, folder: RunFolder, summary: Mapping[str, Any], rows: Mapping[Key, LedgerRow],
    jobs: int = 1,
) -> LedgerRow:  # fmt: skip
    """The ledger's row of a finished training.

    Raises:
        ValueError: the summary lacks something, or has it in another form; or see `reference`, `require_macs`.
    """
    gated = experiment.kind == "gated"
    require_form(summary, _SUMMARY | (_GATES if gated else {"dense": _NET}), str(folder.summary))
    net = summary["frozen" if gated else "dense"]
    gates: dict[str, Any] = {}
    macs_dense, macs_conv_dense = net["macs"], net.get("macs_conv")
    if gated:
        macs_dense, macs_conv_dense = summary["macs_dense"], summary.get("macs_conv_dense")
        gates = _of_gates(summary)
    elif experiment.needs:
        whole = reference(experiment, seed, rows)
        require_macs(experiment, net["macs"], whole)
        macs_dense, macs_conv_dense = whole.macs_dense, whole.macs_conv_dense
    energy = of_run(folder.read_metrics())
    try:
        return LedgerRow(
            experiment=experiment.name,
            seed=seed,
            dataset=dataset_name(recipe_settings(experiment)["data"]),
            model=summary["model"],
            kind=experiment.kind,
            top1_last=net["top1"],
            macs=net["macs"],
            macs_dense=macs_dense,
            macs_conv=net.get("macs_conv"),
            macs_conv_dense=macs_conv_dense,
            epochs=sum(summary["epochs"].values()),
            device=summary["device"],
            commit=summary["commit"],
            versions=summary["versions"],
            wall_s=summary["wall_s"],
            evaluated_on=summary["evaluated_on"],
            params=net["params"],
            train_macs=summary.get("train_macs") or None,
            energy_j=energy.joules,
            energy_reason=energy.reason or None,
            energy_j_image=net.get("energy_j_image"),
            jobs=jobs,
            recipe=recipe_of(experiment),
            amp=summary.get("amp", folder.read_config().amp),
            **gates,
        )
    except LedgerError as error:
        raise ValueError(f"{folder.summary}: {error}") from None


def _of_gates(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "open_ratio": summary["open_ratio"],
        "pruning_rate": summary["pruning_rate"],
        "polar": summary["polarization"],
        "agreement": summary["agreement"],
        "top1_dynamic": summary["dynamic"]["top1"],
        "macs_dynamic": summary["dynamic"]["macs"],
        "top1_whole": summary["dense"]["top1"] if "dense" in summary else None,
    }


def naive_row(bench: Bench, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> LedgerRow:
    """The ledger's row of a dense network that parts are left out of when it is tested."""
    from gatedconv.deploy import load
    from gatedconv.environment import provenance
    from gatedconv.train.finish import figures
    from gatedconv.train.recipe import place, resolve_device
    from reproduce.naive import drop_layers, drop_parameters

    whole = reference(experiment, seed, rows)
    started = time.monotonic()
    weights = find_weights(bench, experiment.needs, seed)
    config = bench.here(bench.folder(experiment.needs, seed).read_config())
    dense: Any = load(weights)
    drop = drop_parameters if experiment.kind == "naive_dropout" else drop_layers
    pruned = drop(dense, experiment.share / 100, seed).eval()
    images = known_images(recipe_settings(experiment)["data"], config)
    found = figures(place(pruned, config), config, images)
    here = provenance(resolve_device(config.device))
    left = found["params"] / sum(parameter.numel() for parameter in dense.parameters())
    return replace(
        whole,
        experiment=experiment.name,
        kind=experiment.kind,
        top1_last=found["top1"],
        macs=found["macs"],
        macs_conv=found["macs_conv"],
        params=found["params"],
        train_macs=None,
        pruning_rate=experiment.share / 100 if experiment.kind == "naive_dropout" else 1 - left,
        epochs=0,
        device=here["device"],
        commit=here["commit"],
        versions=here["versions"],
        wall_s=round(time.monotonic() - started, 2),
        energy_j=None,
        energy_reason=None,
        energy_j_image=None,
        jobs=bench.beside + 1,
        recipe=recipe_of(experiment),
    )
