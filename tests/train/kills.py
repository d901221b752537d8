"""Runs that are killed and continue: the rounds that the tests and ``python -m benchmarks.scaling kills`` make.

A run is a child forked from a process that has everything imported and has trained nothing (what has trained cannot
be forked): it is there at once and can be killed without a trace, after a while drawn at random, or inside the writing
of a checkpoint, before a call of the system that is drawn at random.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gatedconv
from gatedconv.gating import pruner
from gatedconv.train import RunFolder, TrainConfig, run, trainer
from gatedconv.train.checkpoint import has_checkpoint, load_checkpoint
from tests.processes import SERVER

_CALLS = ("fsync", "replace")


# One training of layer gates alone; and everything that a checkpoint holds: parts of steps, gates shut in order of
# rank, a teacher, and a consensus within the run after which training continues with the compact network.
RECIPES: dict[str, dict[str, Any]] = {
    "layer gates": {},
    "channel gates, accumulate 2, mac_control rank, consensus_at 0.5, teacher_at 0.1": {
        "gate": "channel",
        "position": "middle",
        "accumulate": 2,
        "mac_weight": 0.0,
        "mac_control": "rank",
        "mac_ramp": (0.1, 0.3),
        "consensus_at": 0.5,
        "teacher_at": 0.1,
        "epochs": 4,
    },
}


def small_config(archive: Path, **changes: Any) -> TrainConfig:
    """Settings of a run of about a second that writes a checkpoint after every step."""
    settings = {
        "data": f"npz:{archive}",
        "epochs": 3,
        "batch_size": 16,
        "mac_weight": 4.0,
        "gate": "layer",
        "latency": False,
        "dense_baseline": False,
        "device": "cpu",
        "threads": 1,
        "checkpoint_minutes": 1e-9,
        "bn_reestimate": False,
    }
    return TrainConfig(**(settings | changes))


def run_in_child(config: TrainConfig, folder: Path, *, kill_after: float = 0.0, kill_in_call: int = 0) -> bool:
    """Begin or continue a run in a child; False if it was killed before its end.

    Args:
        config: of the run.
        folder: of the run.
        kill_after: seconds after which it is killed; 0 for never.
        kill_in_call: the call of fsync or replace, counted from 1, before which it kills itself; 0 for never.
    """
    child = SERVER.Process(target=_run, args=(config, folder, kill_in_call))
    child.start()
    if kill_after:
        time.sleep(kill_after)
        child.kill()
    child.join()
    assert child.exitcode is not None
    if child.exitcode < 0:
        return False
    if child.exitcode != 0:
        raise RuntimeError(f"{folder}: the run failed with exit code {child.exitcode}")
    return True


def _run(config: TrainConfig, folder: Path, kill_in_call: int) -> None:
    # Exports depend on what is saved alone, and take longer than all the rest.
    trainer.write_exports = lambda *arguments: []
    pruner.EVERY = 2  # a run so short has no twenty steps with gates
    if kill_in_call:
        _kill_in(kill_in_call)
    target = RunFolder(folder)
    sys.exit(0 if run(config, target, resume=target.holds_run()) is not None else 3)


def _kill_in(call: int) -> None:
    left = [call]
    for name in _CALLS:
        real = getattr(os, name)

        def counted(*arguments: Any, real: Any = real) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, name, counted)


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run ends with, times and joules aside."""
    found = RunFolder(folder)
    varying = ("seconds", "core_seconds", "energy_j", "energy_reason", "energy_source")
    states = {}
    for phase in filter(lambda name: has_checkpoint(found.checkpoint(name)), ("gated", "compact")):
        states[phase] = state = load_checkpoint(found.checkpoint(phase))
        state["history"] = [{k: v for k, v in line.items() if k not in varying} for line in state["history"]]
        state.pop("config")
    passing = ("wall_s", "commit", *varying)
    summary = {key: value for key, value in found.read_summary().items() if key not in passing}
    lines = [{k: v for k, v in line.as_dict().items() if k not in varying} for line in found.read_metrics()]
    models = {kind: gatedconv.load(found.model(kind)).state_dict() for kind in ("gated", "compact")}
    masks = json.loads(found.consensus.read_text())
    return {"states": states, "summary": summary, "lines": lines, "models": models, "consensus": masks}


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Places at which two outcomes are not the same to the last bit."""
    if isinstance(left, torch.Tensor):
        same = isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
        return [] if same else [where]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = {str(key): key for key in [*left, *right]}
        return [
            place
            for text, key in keys.items()
            for place in (
                differences(left[key], right[key], f"{where}/{text}") if key in left and key in right else [text]
            )
        ]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{where}/{i}")]
    return [] if json.dumps(left, default=str) == json.dumps(right, default=str) else [where]


def killed_round(
    config: TrainConfig, folder: Path, seconds: float, draw: random.Random, *, calls: int = 45
) -> dict[str, int]:
    """Make a run that is killed at random until it comes to its end, four times at most; how it was killed.

    Args:
        config: of the run.
        folder: of the run.
        seconds: that a run takes which nothing disturbs.
        draw: decides how and when.
        calls: of fsync and replace that such a run makes.
    """
    counts = {"at_a_time": 0, "in_a_write": 0}
    for _ in range(4):
        if draw.random() < 0.5:
            if not run_in_child(config, folder, kill_after=draw.uniform(0.0, seconds)):
                counts["at_a_time"] += 1
        elif not run_in_child(config, folder, kill_in_call=draw.randint(1, calls)):
            counts["in_a_write"] += 1
        if RunFolder(folder).summary.is_file():
            break
    run_in_child(config, folder)
    return counts
