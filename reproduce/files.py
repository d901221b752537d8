"""Where the runs of the experiment table live, and what is kept of them beside the ledger."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gatedconv._io import write_atomic
from gatedconv.train.checkpoint import naming_file
from gatedconv.train.config import TrainConfig
from gatedconv.train.folder import RunFolder

Key = tuple[str, int]


def stem(key: Key) -> str:
    """What the files of a run are called."""
    return f"{key[0]}-seed{key[1]}"


@dataclass(frozen=True)
class Bench:
    """Where the runs of the table live, and on what.

    Attributes:
        runs: folder of run folders, a NAME-seedN each.
        results: folder of ledger.jsonl, epochs/ and consensus/.
        sources: where data sets lie that the table names: {"cifar10": "npz:data/cifar10.npz"}.
        device: as in `TrainConfig`; "" for the recipe's own.
        threads: the same; 0 for the recipe's own.
        deadline: `time.monotonic()` by which to stop; None for never.
        beside: other runs that the device is shared with.
        amp: as in `TrainConfig`; "" for the recipe's own.
        cuda_graph: as in `TrainConfig`.
        command: what runs `gatedconv` in a process of its own.

    Raises:
        ValueError: a device, a number of threads or a mixed precision that no `TrainConfig` takes.
    """

    runs: Path
    results: Path
    sources: Mapping[str, str]
    device: str = ""
    threads: int = 0
    deadline: float | None = None
    beside: int = 0
    amp: str = ""
    cuda_graph: bool = False
    command: tuple[str, ...] = (sys.executable, "-m", "gatedconv")

    def __post_init__(self) -> None:
        """Check what every run would be refused for."""
        TrainConfig(
            device=self.device or "auto", threads=self.threads, amp=self.amp or "off", cuda_graph=self.cuda_graph
        )

    @property
    def ledger(self) -> Path:
        """The ledger of results."""
        return self.results / "ledger.jsonl"

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def folder(self, experiment: str, seed: int) -> RunFolder:
        """The run folder of an experiment and a seed."""
        return RunFolder(self.runs / stem((experiment, seed)))

    def epochs(self, experiment: str, seed: int) -> Path:
        """Where every epoch's metrics are kept."""
        return self.results / "epochs" / f"{stem((experiment, seed))}.jsonl"

    def consensus(self, experiment: str, seed: int) -> Path:
        """Where the consensus of a gated run is kept."""
        return self.results / "consensus" / f"{stem((experiment, seed))}.json"

    def minutes_left(self) -> float:
        """Minutes to the deadline, at least a hundredth; 0 for no deadline, as `max_minutes` has it."""
        return 0.0 if self.deadline is None else max(0.01, (self.deadline - time.monotonic()) / 60)

    def here(self, config: TrainConfig) -> TrainConfig:
        """The config of a finished run with its images, and its device, where they are now."""
        data = self.sources.get(dataset_name(config.data), config.data)
        return replace(config, data=data, device=self.device or config.device)


_AGAIN = "bring it back, or take that run's line out of the ledger, move its run folder away and run it again"


def dataset_name(source: str) -> str:
    """cifar10 -> cifar10, npz:data/digits.npz -> digits."""
    kind, _, path = source.partition(":")
    return Path(path).stem if path else kind


def keep_files(bench: Bench, name: str, seed: int) -> None:
    """Put every epoch's metrics, rounded to what they are good for, and the consensus beside the ledger."""
    folder = bench.folder(name, seed)
    lines = [json.dumps(_rounded(metrics.as_dict())) for metrics in folder.read_metrics()]
    kept = {bench.epochs(name, seed): ("\n".join(lines) + "\n").encode()}
    if folder.consensus.is_file():
        kept[bench.consensus(name, seed)] = folder.consensus.read_bytes()
    for path, content in kept.items():
        with naming_file(path):
            write_atomic(path, content)


def find_consensus(bench: Bench, name: str, seed: int) -> Path:
    """The consensus of a finished gated run, beside the ledger or in its run folder.

    Raises:
        ValueError: it is in neither place.
    """
    places = bench.consensus(name, seed), bench.folder(name, seed).consensus
    for path in places:
        if path.is_file():
            return path
    raise ValueError(
        f"expected the consensus of {name}, seed {seed}, in {places[0]} or {places[1]}, found neither; {_AGAIN}"
    )


def find_weights(bench: Bench, name: str, seed: int) -> Path:
    """The weights of a finished dense run.

    Raises:
        ValueError: they are gone.
    """
    path = bench.folder(name, seed).model("dense")
    if not path.is_file():
        raise ValueError(f"expected the weights of {name}, seed {seed}, in {path}, found nothing there; {_AGAIN}")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items() if inner != {}}
    return value
