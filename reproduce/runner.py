"""Runs of the experiment table: each once, into the ledger; one after the other or several processes at a time."""

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
from gatedconv.train.run_dir import RunFolder
from gatedconv.train.stopping import StopRequest, stop_on_sigterm
from reproduce.checks import known_images, require_complete, require_fit, require_writable
from reproduce.experiment import Experiment
from reproduce.experiments import all_experiments, find_experiment
from reproduce.ledger import LedgerRow, append_row, read_ledger
from reproduce.rows import naive_row, recipe_settings, reference, require_present, training_row
from reproduce.workplace import Key, Workplace, dataset_name, stem

DONE, FAILED, TIME_LIMIT = 0, 1, 3
ROOT = Path(__file__).resolve().parent.parent
# Many experiments need a dense network; the controls need a gated one.
_RANKS = {
    "dense": 0,
    "gated": 1,
    "equal_macs": 2,
    "fixed_at_init": 2,
    "taught_before": 3,
    "naive_dropout": 3,
    "naive_layer": 3,
}
_EXPECTED = (ValueError, TypeError, OSError, ImportError, ArithmeticError, MemoryError)
_POLL_S = 0.2


class Failures(dict[Key, str]):
    """Errors by run; each is printed as it happens."""

    def __setitem__(self, key: Key, message: str) -> None:
        message = " ".join(message.split())
        super().__setitem__(key, message)
        print(f"{key[0]} seed {key[1]}: failed: {message}", file=sys.stderr, flush=True)

    def report(self) -> int:
        """Print the list of failed runs; the exit code."""
        if self:
            names = ", ".join(f"{name} seed {seed}" for name, seed in self)
            print(f"{len(self)} failed: {names}", file=sys.stderr, flush=True)
        return FAILED if self else DONE


def select(names: Sequence[str], seeds: Iterable[int] | None) -> list[Key]:
    """The runs of the named experiments; a name may be a pattern such as table4-*.

    In the order of the experiment table. Within a table the milestones as printed come before the swapped ones, and
    seed after seed, so that an interrupted table has fewer seeds rather than fewer rows.

    Raises:
        ValueError: a name or pattern that matches no experiment, or a seed that none of the matches has.
    """
    known = all_experiments()
    groups = list(dict.fromkeys(each.shown[0] for each in known.values()))
    chosen: set[Key] = set()
    for name in names:
        matches = [known[found] for found in fnmatch.filter(known, name)] or [find_experiment(name)]
        present = sorted({seed for each in matches for seed in each.seeds})
        wanted = present if seeds is None else list(seeds)
        for seed in wanted:
            if seed not in present:
                raise ValueError(f"seed: {name} has the seeds {', '.join(map(str, present))}, got {seed}")
        chosen |= {(each.name, seed) for each in matches for seed in wanted if seed in each.seeds}
    places = {name: place for place, name in enumerate(known)}

    def order(key: Key) -> tuple[int, bool, int, int, int]:
        (name, seed), each = key, known[key[0]]
        return groups.index(each.shown[0]), name.endswith("-swapped"), seed, _RANKS[each.kind], places[name]

    return sorted(chosen, key=order)


def run_experiments(workplace: Workplace, keys: Sequence[Key], jobs: int) -> int:
    """Run what is missing, in ``jobs`` processes at a time.

    Unfinished runs resume; runs already in the ledger are skipped; a run that another one is derived from comes before
    it, selected or not. A failed run stops only the runs that are derived from it.

    Returns:
        0 when all is done; 1 when a run failed; 3 when time was up or SIGTERM came: the same command continues.

    Raises:
        ValueError: a damaged ledger, or no such device.
        OSError: a folder is not writable.
    """
    failures = Failures()
    queue = _plan(keys, read_ledger(workplace.ledger), failures)
    for name, seed in keys:
        if (name, seed) not in queue and (name, seed) not in failures:
            print(f"{name} seed {seed}: done already", flush=True)
    if queue:
        _require_machine(workplace)
    if jobs == 1 or len(queue) < 2:
        code = _one_by_one(workplace, queue, failures)
    else:
        together = replace(workplace, other_runs=max(workplace.other_runs, min(jobs, len(queue)) - 1))
        with stop_on_sigterm() as stop, stop.deferred():
            code = _side_by_side(together, queue, jobs, failures, stop)
        if stop.requested:
            return failures.report() or TIME_LIMIT
    return failures.report() or code


def run_one(workplace: Workplace, name: str, seed: int) -> int:
    """Run one experiment with one seed and add its row; 0 when done, 3 when time was up.

    Raises:
        ValueError: the ledger, or the run folder, has it by another recipe; another process trains it; or the run that
            it is derived from is missing.
    """
    experiment, folder = find_experiment(name), workplace.folder(name, seed)
    with stop_on_sigterm() as stop, folder.locked() if experiment.trains else nullcontext():
        rows = read_ledger(workplace.ledger)  # under the lock: another process may have just run it
        if (name, seed) in rows:
            require_present(rows[name, seed])
            return DONE
        print(f"{name} seed {seed}", flush=True)
        if not experiment.trains:
            append_row(workplace.ledger, naive_row(workplace, experiment, seed, rows))
            return DONE
        summary = _trained(workplace, experiment, seed, rows, stop)
        if summary is None:
            return TIME_LIMIT
        require_complete(folder, folder.read_config())
        row = training_row(experiment, seed, folder, summary, rows, workplace.other_runs + 1)
        workplace.keep_files(name, seed)
        append_row(workplace.ledger, row)
    return DONE


def _trained(
    workplace: Workplace, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow], stop: StopRequest
) -> dict[str, Any] | None:
    """The summary of a run that is finished, already or now; None when time was up."""
    from gatedconv.cli.progress import make_progress
    from gatedconv.train.trainer import run as run_training

    config, folder = experiment_config(workplace, experiment, seed, rows), workplace.folder(experiment.name, seed)
    if folder.summary.is_file():
        _require_recipe(folder, config, experiment.name)
        return folder.read_summary()
    images = known_images(recipe_settings(experiment)["data"], config)
    require_fit(experiment, config, images, rows.get((experiment.needs, seed)))
    del images  # the training reads them again
    with make_progress() as callback:
        return run_training(config, folder, resume=folder.holds_run(), callback=callback, stop=stop)


def experiment_config(
    workplace: Workplace, experiment: Experiment, seed: int, rows: Mapping[Key, LedgerRow]
) -> TrainConfig:
    """The config of a run: preset < the experiment's settings < those of this machine.

    Raises:
        ValueError: the run that a control is derived from is not finished, or its consensus is missing.
    """
    settings = recipe_settings(experiment)
    settings |= {"name": experiment.name, "seed": seed, "max_minutes": workplace.minutes_left()}
    if experiment.needs:
        gated = reference(experiment, seed, rows)
        settings["mac_target"] = min(1.0, gated.macs / gated.macs_dense)
        if experiment.kind == "fixed_at_init":
            settings["subnetwork"] = str(workplace.find_consensus(experiment.needs, seed))
        if experiment.taught_by:
            settings["teacher_file"] = str(workplace.find_weights(experiment.taught_by, seed))
    settings["data"] = workplace.sources.get(dataset_name(settings["data"]), settings["data"])
    settings |= {"device": workplace.device} if workplace.device else {}
    settings |= {"threads": workplace.threads} if workplace.threads else {}
    settings |= {"amp": workplace.amp} if workplace.amp else {}
    settings["cuda_graph"] = workplace.cuda_graph
    settings["shared_device"] = workplace.other_runs > 0
    return make_config(settings, where=experiment.name)


def _require_recipe(folder: RunFolder, config: TrainConfig, name: str) -> None:
    """Check that a finished run has the present recipe of its experiment; its images may have moved since.

    Raises:
        ValueError: names the first setting that differs.
    """
    stored = folder.read_config()
    if dataset_name(stored.data) == dataset_name(config.data):
        stored = replace(stored, data=config.data)
    where = f"{folder.config}: a finished run, but not of {name} as it is now; move it away to run it again"
    require_same_recipe(vars(stored), config, where)


def _plan(keys: Iterable[Key], rows: Mapping[Key, LedgerRow], failures: Failures) -> list[Key]:
    """The missing runs, each after the one that it is derived from; rows of other recipes are failures."""
    queue: list[Key] = []
    for name, seed in keys:
        sources = () if (name, seed) in rows else find_experiment(name).sources
        for key in (*((source, seed) for source in sources), (name, seed)):
            if key not in rows:
                queue += [key] if key not in queue else []
            elif key not in failures:
                try:
                    require_present(rows[key])
                except ValueError as error:
                    failures[key] = str(error)
    return queue


def _require_machine(workplace: Workplace) -> None:
    """Fail fast on problems that would otherwise stop every run hours later."""
    from gatedconv.train.device import resolve_device

    if workplace.device:
        resolve_device(workplace.device)
    for folder in (workplace.runs, workplace.results):
        require_writable(folder)


def _blocked(key: Key, failures: Failures, unfinished: Collection[Key] = ()) -> bool:
    """Whether the run that this one is derived from is unfinished or has failed; then this one fails too."""
    sources = [(source, key[1]) for source in find_experiment(key[0]).sources]
    for source in sources:
        if source in failures and key not in failures:
            failures[key] = f"is derived from {source[0]}, seed {source[1]}, which failed"
    return key in failures or any(source in unfinished for source in sources)


def _one_by_one(workplace: Workplace, queue: Sequence[Key], failures: Failures) -> int:
    for key in queue:
        if workplace.late:
            return TIME_LIMIT
        if _blocked(key, failures):
            continue
        try:
            if run_one(workplace, *key) != DONE:
                return TIME_LIMIT
        except Exception as error:  # one failed run does not stop the others
            if not isinstance(error, _EXPECTED):
                traceback.print_exc()
            failures[key] = str(error) or type(error).__name__
    return DONE


def _side_by_side(
    workplace: Workplace, queue: list[Key], jobs: int, failures: Failures, stop: StopRequest | None = None
) -> int:
    """Run the queue in several processes; 0, or 3 where runs are left."""
    stop = stop or StopRequest()
    running: dict[Key, _Process] = {}
    unfinished: set[Key] = set()
    try:
        while running or (queue and not workplace.late and not stop.requested):
            if not workplace.late and not stop.requested:
                _start_some(workplace, queue, jobs, failures, running, unfinished)
            for key, each in list(running.items()):
                code = each.process.poll()
                if code is not None:
                    del running[key]
                    if code == TIME_LIMIT or (stop.requested and code == -signal.SIGTERM):
                        unfinished.add(key)
                    elif code != DONE:
                        failures[key] = _log_tail(_log(workplace, key), code, each.log_begin)
                elif stop.requested and not each.terminated:
                    each.terminated = True
                    each.process.terminate()
            time.sleep(_POLL_S)
    finally:
        for each in running.values():
            each.process.terminate()
        for each in running.values():
            each.process.wait()
    return TIME_LIMIT if queue or unfinished else DONE


@dataclass
class _Process:
    """A running process, the size of its log (bytes) when it started, and whether it was sent SIGTERM."""

    process: subprocess.Popen[bytes]
    log_begin: int
    terminated: bool = False


def _start_some(
    workplace: Workplace,
    queue: list[Key],
    jobs: int,
    failures: Failures,
    running: dict[Key, _Process],
    unfinished: set[Key],
) -> None:
    """Start processes until ``jobs`` run; blocked runs leave the queue."""
    for key in list(queue) if len(running) < jobs else []:
        if _blocked(key, failures, unfinished):
            queue.remove(key)
            unfinished |= {key} - failures.keys()
        elif len(running) < jobs and not {(name, key[1]) for name in find_experiment(key[0]).sources} & {
            *queue,
            *running,
        }:
            queue.remove(key)
            log = _log(workplace, key)
            begin = log.stat().st_size if log.is_file() else 0
            running[key] = _Process(_start(workplace, key), begin)


def _start(workplace: Workplace, key: Key) -> subprocess.Popen[bytes]:
    command = [*workplace.command, "run", key[0], "--seed", str(key[1])]
    command += ["--runs", str(workplace.runs), "--results", str(workplace.results)]
    command += ["--other-runs", str(workplace.other_runs)]
    for name, source in workplace.sources.items():
        command += ["--source", f"{name}={source}"]
    command += ["--device", workplace.device] if workplace.device else []
    command += ["--threads", str(workplace.threads)] if workplace.threads else []
    command += ["--amp", workplace.amp] if workplace.amp else []
    command += ["--cuda-graph"] if workplace.cuda_graph else []
    command += ["--max-minutes", f"{workplace.minutes_left():.2f}"] if workplace.deadline is not None else []
    workplace.runs.mkdir(parents=True, exist_ok=True)
    log = _log(workplace, key)
    print(f"{key[0]} seed {key[1]}: started, log in {log}", flush=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": paths})


def _log(workplace: Workplace, key: Key) -> Path:
    return workplace.runs / f"{stem(key)}.log"


def _log_tail(log: Path, code: int, begin: int) -> str:
    """The reason, or the last line, that a failed process wrote to its log after byte ``begin``."""
    text = log.read_bytes()[begin:].decode(errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    reason = next((line.partition(": failed: ")[2] for line in reversed(lines) if ": failed: " in line), "")
    return f"{reason or (lines[-1] if lines else 'no output')} (exit code {code}, {log})"
