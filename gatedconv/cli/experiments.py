"""`gatedconv report run`: runs of the experiment table, each once, into the ledger."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gatedconv.deploy.atomic import write_atomic
from gatedconv.report.experiments import Experiment, all_experiments, find_experiment
from gatedconv.report.ledger import LedgerRow, append_row, read_ledger
from gatedconv.train.checkpoint import naming_file
from gatedconv.train.config import TrainConfig, make_config, require_same_recipe
from gatedconv.train.folder import RunFolder
from gatedconv.train.presets import preset_settings

DONE, TIME_LIMIT = 0, 3
Key = tuple[str, int]


@dataclass(frozen=True)
class Bench:
    """Where the runs of the table live.

    Attributes:
        runs: folder of run folders, a NAME-seedN each.
        results: folder of ledger.jsonl and epochs/.
        sources: where data sets lie that the table names: {"cifar10": "npz:data/cifar10.npz"}.
        device: as in `TrainConfig`; "" for the recipe's own.
        threads: the same; 0 for the recipe's own.
        deadline: `time.monotonic()` by which to stop; None for never.
        command: what runs `gatedconv` in a process of its own.
    """

    runs: Path
    results: Path
    sources: Mapping[str, str]
    device: str = ""
    threads: int = 0
    deadline: float | None = None
    command: tuple[str, ...] = (sys.executable, "-m", "gatedconv")

    @property
    def ledger(self) -> Path:
        """The ledger of results."""
        return self.results / "ledger.jsonl"

    def folder(self, experiment: str, seed: int) -> RunFolder:
        """The run folder of an experiment and a seed."""
        return RunFolder(self.runs / f"{experiment}-seed{seed}")

    def minutes_left(self) -> float:
        """Minutes to the deadline, at least a hundredth; 0 for no deadline, as `max_minutes` has it."""
        return 0.0 if self.deadline is None else max(0.01, (self.deadline - time.monotonic()) / 60)


def select(names: Sequence[str], seeds: Iterable[int] | None) -> list[Key]:
    """The runs that are asked for, in the table's order; a name may be a pattern such as table4-*.

    Raises:
        ValueError: a name or pattern that fits no experiment, or a seed that one does not have.
    """
    known = all_experiments()
    wanted: set[str] = set()
    for name in names:
        found = fnmatch.filter(known, name) or [find_experiment(name).name]
        wanted.update(found)
    chosen = []
    for name in known:
        if name in wanted:
            own = known[name].seeds
            for seed in own if seeds is None else seeds:
                if seed not in own:
                    raise ValueError(f"seed: {name} has the seeds {', '.join(map(str, own))}, got {seed}")
                chosen.append((name, seed))
    return chosen


def run_experiments(bench: Bench, keys: Sequence[Key], jobs: int) -> int:
    """Run what is missing, ``jobs`` processes side by side; 0 when all is done, 3 when time was up.

    What is begun goes on where it was cut off, what is in the ledger is skipped, and what another run is made
    from comes before it, whether or not it was asked for.
    """
    queue = _with_needs(keys, set(read_ledger(bench.ledger)))
    for name, seed in keys:
        if (name, seed) not in queue:
            print(f"{name} seed {seed}: done already", flush=True)
    if jobs == 1:
        for key in queue:
            if bench.deadline is not None and time.monotonic() > bench.deadline:
                return TIME_LIMIT
            if run_one(bench, *key) != DONE:
                return TIME_LIMIT
        return DONE
    return _side_by_side(bench, queue, jobs)


def run_one(bench: Bench, name: str, seed: int) -> int:
    """Run one experiment with one seed and add its row; 0 when done, 3 when time was up."""
    from gatedconv.cli.progress import make_listener
    from gatedconv.train.pipeline import run as run_training

    experiment = find_experiment(name)
    rows = read_ledger(bench.ledger)
    if (name, seed) in rows:
        return DONE
    print(f"{name} seed {seed}", flush=True)
    if not experiment.trains:
        append_row(bench.ledger, _naive_row(bench, experiment, seed, rows))
        return DONE
    config, folder = experiment_config(bench, experiment, seed, rows), bench.folder(name, seed)
    summary = None
    if folder.summary.is_file():
        _require_recipe(folder, config, name)
        summary = folder.read_summary()
    if summary is None:
        with make_listener() as listener:
            summary = run_training(config, folder, resume=folder.holds_run(), listener=listener)
    if summary is None:
        return TIME_LIMIT
    _keep_epochs(bench, folder, name, seed)
    append_row(bench.ledger, training_row(experiment, seed, folder, summary, rows))
    return DONE


def experiment_config(bench: Bench, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> TrainConfig:
    """The config of a run: preset < the experiment's settings < what this machine needs.

    Raises:
        ValueError: the run that a control is made from is not finished, or its consensus is not kept.
    """
    settings = (preset_settings(experiment.preset) if experiment.preset else {}) | dict(experiment.settings)
    settings |= {"name": experiment.name, "seed": seed, "max_minutes": bench.minutes_left()}
    if experiment.needs:
        reference = _reference(experiment, seed, rows)
        settings["mac_target"] = min(1.0, reference.macs / reference.macs_dense)
        if experiment.kind == "fixed_at_init":
            settings["subnetwork"] = str(bench.folder(experiment.needs, seed).consensus)
    settings["data"] = bench.sources.get(dataset_name(settings["data"]), settings["data"])
    settings |= {"device": bench.device} if bench.device else {}
    settings |= {"threads": bench.threads} if bench.threads else {}
    return make_config(settings, where=experiment.name)


def _require_recipe(folder: RunFolder, config: TrainConfig, name: str) -> None:
    """Check that a finished run is the one that is asked for: a folder's name alone does not tell its recipe.

    Raises:
        ValueError: naming the first setting that differs; the images may lie elsewhere by now.
    """
    stored = folder.read_config()
    if dataset_name(stored.data) == dataset_name(config.data):
        stored = replace(stored, data=config.data)
    where = f"{folder.config}: a finished run, but not of {name} as it is now; move it away to run it again"
    require_same_recipe(vars(stored), config, where)


def dataset_name(source: str) -> str:
    """cifar10 -> cifar10, npz:data/digits.npz -> digits."""
    kind, _, path = source.partition(":")
    return Path(path).stem if path else kind


def training_row(
    experiment: Experiment, seed: int, folder: RunFolder, summary: Mapping[str, Any], rows: Mapping[Key, LedgerRow]
) -> LedgerRow:
    """The ledger's row of a finished training."""
    recipe = (preset_settings(experiment.preset) if experiment.preset else {}) | dict(experiment.settings)
    net = summary["frozen"] if experiment.kind == "gated" else summary["dense"]
    gates: dict[str, Any] = {}
    macs_dense = net["macs"]
    if experiment.kind == "gated":
        macs_dense = summary["macs_dense"]
        gates = {
            "open_ratio": summary["open_ratio"],
            "pruning_rate": summary["pruning_rate"],
            "polar": summary["polarization"],
            "agreement": summary["agreement"],
            "top1_dynamic": summary["dynamic"]["top1"],
            "macs_dynamic": summary["dynamic"]["macs"],
        }
    elif experiment.needs:
        macs_dense = _reference(experiment, seed, rows).macs_dense
    energies = [getattr(line, "energy_j", None) for line in folder.read_metrics()]
    known = [energy for energy in energies if energy is not None]
    return LedgerRow(
        experiment=experiment.name,
        seed=seed,
        dataset=dataset_name(recipe["data"]),
        model=summary["model"],
        kind=experiment.kind,
        top1_last=net["top1"],
        macs=net["macs"],
        macs_dense=macs_dense,
        epochs=sum(summary["epochs"].values()),
        device=summary["device"],
        commit=summary["commit"],
        versions=summary["versions"],
        wall_s=summary["wall_s"],
        evaluated_on=summary["evaluated_on"],
        params=net["params"],
        energy_j=sum(known) if known and len(known) == len(energies) else None,
        energy_j_image=net.get("energy_j_image"),
        **gates,
    )


def _naive_row(bench: Bench, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> LedgerRow:
    from gatedconv.deploy import load
    from gatedconv.train.build import load_images
    from gatedconv.train.finish import figures
    from gatedconv.train.naive import drop_layers, drop_parameters
    from gatedconv.train.recipe import place

    reference = _reference(experiment, seed, rows)
    started = time.monotonic()
    folder = bench.folder(experiment.needs, seed)
    config = folder.read_config()
    dense: Any = load(folder.model("dense"))
    drop = drop_parameters if experiment.kind == "naive_dropout" else drop_layers
    pruned = drop(dense, experiment.share / 100, seed).eval()
    found = figures(place(pruned, config), config, load_images(config))
    left = found["params"] / sum(parameter.numel() for parameter in dense.parameters())
    return replace(
        reference,
        experiment=experiment.name,
        kind=experiment.kind,
        top1_last=found["top1"],
        macs=found["macs"],
        params=found["params"],
        pruning_rate=experiment.share / 100 if experiment.kind == "naive_dropout" else 1 - left,
        epochs=0,
        wall_s=round(time.monotonic() - started, 2),
        energy_j=None,
        energy_j_image=None,
    )


def _reference(experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> LedgerRow:
    if (experiment.needs, seed) not in rows:
        raise ValueError(f"{experiment.name}: is made from {experiment.needs}, seed {seed}, which is not finished yet")
    return rows[experiment.needs, seed]


def _with_needs(keys: Iterable[Key], done: set[Key]) -> list[Key]:
    queue: list[Key] = []
    for name, seed in keys:
        needs = find_experiment(name).needs
        for key in ((needs, seed), (name, seed)) if needs else ((name, seed),):
            if key not in done and key not in queue:
                queue.append(key)
    return queue


def _side_by_side(bench: Bench, queue: list[Key], jobs: int) -> int:
    running: dict[Key, subprocess.Popen[bytes]] = {}
    code, broken = DONE, set[Key]()
    try:
        while queue or running:
            late = bench.deadline is not None and time.monotonic() > bench.deadline
            for key in [] if late else list(queue):
                needs = find_experiment(key[0]).needs, key[1]
                if needs in broken:  # a run that ends early takes along only what is made from it
                    queue.remove(key)
                    broken.add(key)
                elif len(running) < jobs and needs not in {*queue, *running}:
                    queue.remove(key)
                    running[key] = _start(bench, key)
            for key, process in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    if process.returncode:
                        broken.add(key)
                        code = process.returncode if code in (DONE, TIME_LIMIT) else code
            if late and not running:
                return code or TIME_LIMIT
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
    return code


def _start(bench: Bench, key: Key) -> subprocess.Popen[bytes]:
    command = [*bench.command, "report", "run", key[0], "--seed", str(key[1])]
    command += ["--runs", str(bench.runs), "--results", str(bench.results)]
    for name, source in bench.sources.items():
        command += ["--source", f"{name}={source}"]
    command += ["--device", bench.device] if bench.device else []
    command += ["--threads", str(bench.threads)] if bench.threads else []
    command += ["--max-minutes", f"{bench.minutes_left():.2f}"] if bench.deadline is not None else []
    bench.runs.mkdir(parents=True, exist_ok=True)
    log = bench.runs / f"{key[0]}-seed{key[1]}.log"
    print(f"{key[0]} seed {key[1]}: started, told in {log}", flush=True)
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ)


def _keep_epochs(bench: Bench, folder: RunFolder, name: str, seed: int) -> None:
    """Every epoch's metrics, rounded to what they are good for, beside the ledger."""
    lines = [json.dumps(_rounded(metrics.as_dict())) for metrics in folder.read_metrics()]
    path = bench.results / "epochs" / f"{name}-seed{seed}.jsonl"
    with naming_file(path):
        write_atomic(path, ("\n".join(lines) + "\n").encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items() if inner != {}}
    return value
