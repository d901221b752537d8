"""`gatedconv report run`: runs of the experiment table, each once, into the ledger."""

from __future__ import annotations

import fnmatch
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gatedconv.train.config import TrainConfig, make_config, require_same_recipe
from gatedconv.train.folder import RunFolder
from gatedconv.train.stopping import StopRequest, stop_on_sigterm
from reproduce.checks import known_images, require_fit, require_whole, require_writable
from reproduce.energy import measure_energy
from reproduce.files import Bench, Key, dataset_name, find_consensus, keep_files, stem
from reproduce.ledger import LedgerRow, append_row, read_ledger
from reproduce.rows import naive_row, recipe_settings, reference, require_present, training_row
from reproduce.table import Experiment, all_experiments, find_experiment

DONE, FAILED, TIME_LIMIT = 0, 1, 3
# A dense net is needed by most of what comes after it, a gated one by its controls.
_RANKS = {"dense": 0, "gated": 1, "equal_macs": 2, "fixed_at_init": 2, "naive_dropout": 3, "naive_layer": 3}
_EXPECTED = (ValueError, TypeError, OSError, ImportError, ArithmeticError, MemoryError)


class Failures(dict[Key, str]):
    """What went wrong, by run; told at once."""

    def __setitem__(self, key: Key, message: str) -> None:
        message = " ".join(message.split())
        super().__setitem__(key, message)
        print(f"{key[0]} seed {key[1]}: failed: {message}", file=sys.stderr, flush=True)


def select(names: Sequence[str], seeds: Iterable[int] | None) -> list[Key]:
    """The runs that are asked for; a name may be a pattern such as table4-*.

    Table by table in the order of the experiment table. Within one of them the milestones as printed come before
    the swapped ones, and seed after seed, so that wherever time ends there is a table with fewer seeds.

    Raises:
        ValueError: a name or pattern that fits no experiment, or a seed that the named one, or none of those that fit
            the pattern, has.
    """
    known = all_experiments()
    groups = list(dict.fromkeys(each.shown[0] for each in known.values()))
    chosen: set[Key] = set()
    for name in names:
        fitting = [known[found] for found in fnmatch.filter(known, name)] or [find_experiment(name)]
        present = sorted({seed for each in fitting for seed in each.seeds})
        asked = present if seeds is None else list(seeds)
        for seed in asked:
            if seed not in present:
                raise ValueError(f"seed: {name} has the seeds {', '.join(map(str, present))}, got {seed}")
        chosen |= {(each.name, seed) for each in fitting for seed in asked if seed in each.seeds}
    places = {name: place for place, name in enumerate(known)}

    def order(key: Key) -> tuple[int, bool, int, int, int]:
        (name, seed), each = key, known[key[0]]
        return groups.index(each.shown[0]), name.endswith("-swapped"), seed, _RANKS[each.kind], places[name]

    return sorted(chosen, key=order)


def run_experiments(bench: Bench, keys: Sequence[Key], jobs: int) -> int:
    """Run what is missing, ``jobs`` processes side by side.

    What is begun goes on where it was cut off, what is in the ledger is skipped, and what another run is made
    from comes before it, whether or not it was asked for. A run that fails stops only what is made from it.

    Returns:
        0 when all is done, 1 when something failed, which is told at the end, 3 when time was up or SIGTERM came:
        runs leave their checkpoints, and the same command goes on.

    Raises:
        ValueError: a damaged ledger, or no such device.
        OSError: a folder cannot be written to.
    """
    failures = Failures()
    queue = _plan(keys, read_ledger(bench.ledger), failures)
    for name, seed in keys:
        if (name, seed) not in queue and (name, seed) not in failures:
            print(f"{name} seed {seed}: done already", flush=True)
    if queue:
        _require_machine(bench)
    if jobs == 1 or len(queue) < 2:
        code = _one_by_one(bench, queue, failures)
    else:
        together = replace(bench, beside=max(bench.beside, min(jobs, len(queue)) - 1))
        with stop_on_sigterm() as stop, stop.patiently():
            code = _side_by_side(together, queue, jobs, failures, stop)
        if stop.made:
            return _told(failures) or TIME_LIMIT
    if jobs > 1 and not bench.beside:  # nothing else runs any more
        measure_energy(bench, keys, failures)
    return _told(failures) or code


def energy_of_images(bench: Bench, keys: Sequence[Key]) -> int:
    """Measure the joules per image that finished runs lack; 0, or 1 when something failed."""
    failures = Failures()
    measure_energy(bench, keys, failures)
    return _told(failures)


def run_one(bench: Bench, name: str, seed: int) -> int:
    """Run one experiment with one seed and add its row; 0 when done, 3 when time was up.

    Raises:
        ValueError: the ledger, or the run folder, has it by another recipe; another process trains it; or what it is
            made from is missing.
    """
    experiment, folder = find_experiment(name), bench.folder(name, seed)
    with stop_on_sigterm() as stop, folder.claimed() if experiment.trains else nullcontext():
        rows = read_ledger(bench.ledger)  # now: another process may have run it
        if (name, seed) in rows:
            require_present(rows[name, seed])
            return DONE
        print(f"{name} seed {seed}", flush=True)
        if not experiment.trains:
            append_row(bench.ledger, naive_row(bench, experiment, seed, rows))
            return DONE
        summary = _trained(bench, experiment, seed, rows, stop)
        if summary is None:
            return TIME_LIMIT
        require_whole(folder, folder.read_config())
        row = training_row(experiment, seed, folder, summary, rows, bench.beside + 1)
        keep_files(bench, name, seed)
        append_row(bench.ledger, row)
    return DONE


def _trained(
    bench: Bench, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow], stop: StopRequest
) -> dict[str, Any] | None:
    """The summary of a run that is finished already, or is now; None when time was up."""
    from gatedconv.cli.progress import make_listener
    from gatedconv.train.pipeline import run as run_training

    config, folder = experiment_config(bench, experiment, seed, rows), bench.folder(experiment.name, seed)
    if folder.summary.is_file():
        _require_recipe(folder, config, experiment.name)
        return folder.read_summary()
    images = known_images(recipe_settings(experiment)["data"], config)
    require_fit(experiment, config, images, rows.get((experiment.needs, seed)))
    del images  # they are read once more
    with make_listener() as listener:
        return run_training(config, folder, resume=folder.holds_run(), listener=listener, stop=stop)


def experiment_config(bench: Bench, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]) -> TrainConfig:
    """The config of a run: preset < the experiment's settings < what this machine needs.

    Raises:
        ValueError: the run that a control is made from is not finished, or its consensus is not kept.
    """
    settings = recipe_settings(experiment)
    settings |= {"name": experiment.name, "seed": seed, "max_minutes": bench.minutes_left()}
    if experiment.needs:
        gated = reference(experiment, seed, rows)
        settings["mac_target"] = min(1.0, gated.macs / gated.macs_dense)
        if experiment.kind == "fixed_at_init":
            settings["subnetwork"] = str(find_consensus(bench, experiment.needs, seed))
    settings["data"] = bench.sources.get(dataset_name(settings["data"]), settings["data"])
    settings |= {"device": bench.device} if bench.device else {}
    settings |= {"threads": bench.threads} if bench.threads else {}
    settings |= {"amp": bench.amp} if bench.amp else {}
    settings["cuda_graph"] = bench.cuda_graph
    settings["shared_device"] = bench.beside > 0
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


def _plan(keys: Iterable[Key], rows: Mapping[Key, LedgerRow], failures: Failures) -> list[Key]:
    """What is missing, with what it is made from before it; rows of other recipes are failures."""
    queue: list[Key] = []
    for name, seed in keys:
        needs = find_experiment(name).needs
        for key in ((needs, seed), (name, seed)) if needs and (name, seed) not in rows else ((name, seed),):
            if key not in rows:
                queue += [key] if key not in queue else []
            elif key not in failures:
                try:
                    require_present(rows[key])
                except ValueError as error:
                    failures[key] = str(error)
    return queue


def _require_machine(bench: Bench) -> None:
    """Check what every run would trip over, each by itself, and after hours."""
    from gatedconv.train.recipe import resolve_device

    if bench.device:
        resolve_device(bench.device)
    for folder in (bench.runs, bench.results):
        require_writable(folder)


def _blocked(key: Key, failures: Failures, cut_short: Collection[Key] = ()) -> bool:
    """Whether what a run is made from was cut short, or has failed: then so has this one."""
    needs = find_experiment(key[0]).needs, key[1]
    if needs in failures:
        failures[key] = f"is made from {needs[0]}, seed {needs[1]}, which failed"
    return needs in failures or needs in cut_short


def _one_by_one(bench: Bench, queue: Sequence[Key], failures: Failures) -> int:
    for key in queue:
        if bench.late:
            return TIME_LIMIT
        if _blocked(key, failures):
            continue
        try:
            if run_one(bench, *key) != DONE:
                return TIME_LIMIT
        except Exception as error:  # whatever is wrong with one run, the others go on
            if not isinstance(error, _EXPECTED):
                traceback.print_exc()
            failures[key] = str(error) or type(error).__name__
    return DONE


def _told(failures: Failures) -> int:
    if failures:
        names = ", ".join(f"{name} seed {seed}" for name, seed in failures)
        print(f"{len(failures)} failed: {names}", file=sys.stderr, flush=True)
    return FAILED if failures else DONE


def _side_by_side(
    bench: Bench, queue: list[Key], jobs: int, failures: Failures, stop: StopRequest | None = None
) -> int:
    stop = stop or StopRequest()
    running: dict[Key, _Running] = {}
    cut_short: set[Key] = set()
    try:
        while running or (queue and not bench.late and not stop.made):
            for key in list(queue) if len(running) < jobs and not bench.late and not stop.made else []:
                if _blocked(key, failures, cut_short):
                    queue.remove(key)
                    cut_short |= {key} - failures.keys()
                elif len(running) < jobs and (find_experiment(key[0]).needs, key[1]) not in {*queue, *running}:
                    queue.remove(key)
                    told = _size(_log(bench, key))
                    running[key] = _Running(_start(bench, key), told)
            for key, each in list(running.items()):
                code = each.process.poll()
                if code is not None:
                    del running[key]
                    if code == TIME_LIMIT or (stop.made and code == -signal.SIGTERM):
                        cut_short.add(key)
                    elif code != DONE:
                        failures[key] = _last_words(_log(bench, key), code, each.told)
                elif stop.made and not each.asked:
                    each.asked = True
                    each.process.terminate()
            time.sleep(0.2)
    finally:
        for each in running.values():
            each.process.terminate()
        for each in running.values():
            each.process.wait()
    return TIME_LIMIT if queue or cut_short else DONE


@dataclass
class _Running:
    """A process, what its log had told before (bytes), and whether it was asked to stop."""

    process: subprocess.Popen[bytes]
    told: int
    asked: bool = False


def _start(bench: Bench, key: Key) -> subprocess.Popen[bytes]:
    command = [*bench.command, "report", "run", key[0], "--seed", str(key[1])]
    command += ["--runs", str(bench.runs), "--results", str(bench.results), "--beside", str(bench.beside)]
    for name, source in bench.sources.items():
        command += ["--source", f"{name}={source}"]
    command += ["--device", bench.device] if bench.device else []
    command += ["--threads", str(bench.threads)] if bench.threads else []
    command += ["--amp", bench.amp] if bench.amp else []
    command += ["--cuda-graph"] if bench.cuda_graph else []
    command += ["--max-minutes", f"{bench.minutes_left():.2f}"] if bench.deadline is not None else []
    bench.runs.mkdir(parents=True, exist_ok=True)
    log = _log(bench, key)
    print(f"{key[0]} seed {key[1]}: started, told in {log}", flush=True)
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ)


def _log(bench: Bench, key: Key) -> Path:
    return bench.runs / f"{stem(key)}.log"


def _size(log: Path) -> int:
    return log.stat().st_size if log.is_file() else 0


def _last_words(log: Path, code: int, begin: int) -> str:
    """What a failed process told last, of what stands in its log from byte ``begin``; and where the rest is."""
    text = log.read_bytes()[begin:].decode(errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    told = next((line.partition(": failed: ")[2] for line in reversed(lines) if ": failed: " in line), "")
    return f"{told or (lines[-1] if lines else 'nothing was told')} (exit code {code}, {log})"
