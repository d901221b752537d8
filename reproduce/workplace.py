"""The place of the experiment table's runs: their folders and device, and which of their files are kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gatedconv._io import write_atomic, write_json_lines
from gatedconv.train.config import TrainConfig
from gatedconv.train.run_dir import RunFolder

Key = tuple[str, int]
"""Experiment and seed."""

_AGAIN = "restore it, or remove that run's line from the ledger, move its run folder away and run it again"


def stem(key: Key) -> str:
    """The name of a run's folder and files."""
    return f"{key[0]}-seed{key[1]}"


def dataset_name(source: str) -> str:
    """cifar10 -> cifar10, npz:data/digits.npz -> digits."""
    kind, _, path = source.partition(":")
    return Path(path).stem if path else kind


@dataclass(frozen=True)
class Workplace:
    """Folders and machine settings of the runs.

    Attributes:
        runs: folder of run folders, one NAME-seedN each.
        results: folder of ledger.jsonl, epochs/ and consensus/.
        sources: data sources by data set name: {"cifar10": "npz:data/cifar10.npz"}.
        device: as in `TrainConfig`; "" for the recipe's.
        threads: as in `TrainConfig`; 0 for the recipe's.
        deadline: `time.monotonic()` at which to stop; None for never.
        other_runs: number of other runs on the same device.
        amp: as in `TrainConfig`; "" for the recipe's.
        cuda_graph: as in `TrainConfig`.
        command: the program of a run in a process of its own.

    Raises:
        ValueError: a device, a number of threads or a mixed precision that `TrainConfig` refuses.
    """

    runs: Path
    results: Path
    sources: Mapping[str, str]
    device: str = ""
    threads: int = 0
    deadline: float | None = None
    other_runs: int = 0
    amp: str = ""
    cuda_graph: bool = False
    command: tuple[str, ...] = (sys.executable, "-m", "reproduce")

    def __post_init__(self) -> None:
        """Check the settings that every run would be refused for."""
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

    def minutes_left(self) -> float:
        """Minutes to the deadline, at least a hundredth; 0 without a deadline, as in `max_minutes`."""
        return 0.0 if self.deadline is None else max(0.01, (self.deadline - time.monotonic()) / 60)

    def folder(self, experiment: str, seed: int) -> RunFolder:
        """The run folder of an experiment and a seed."""
        return RunFolder(self.runs / stem((experiment, seed)))

    def epochs(self, experiment: str, seed: int) -> Path:
        """The kept metrics of every epoch."""
        return self.results / "epochs" / f"{stem((experiment, seed))}.jsonl"

    def consensus(self, experiment: str, seed: int) -> Path:
        """The kept consensus of a gated run."""
        return self.results / "consensus" / f"{stem((experiment, seed))}.json"

    def here(self, config: TrainConfig) -> TrainConfig:
        """The config of a finished run with the data source and device of this machine."""
        data = self.sources.get(dataset_name(config.data), config.data)
        return replace(config, data=data, device=self.device or config.device)

    def keep_files(self, name: str, seed: int) -> None:
        """Copy every epoch's metrics, rounded to 5 digits, and the consensus to the results folder."""
        folder = self.folder(name, seed)
        epochs, consensus = self.epochs(name, seed), self.consensus(name, seed)
        write_json_lines(epochs, [_rounded(metrics.as_dict()) for metrics in folder.read_metrics()])
        if folder.consensus.is_file():
            write_atomic(consensus, folder.consensus.read_bytes())

    def find_consensus(self, name: str, seed: int) -> Path:
        """The consensus of a finished gated run, in the results folder or in its run folder.

        Raises:
            ValueError: it is in neither.
        """
        places = self.consensus(name, seed), self.folder(name, seed).consensus
        for path in places:
            if path.is_file():
                return path
        raise ValueError(
            f"expected the consensus of {name}, seed {seed}, in {places[0]} or {places[1]}, found neither; {_AGAIN}"
        )

    def find_weights(self, name: str, seed: int) -> Path:
        """The weights of a finished dense run.

        Raises:
            ValueError: the file is missing.
        """
        path = self.folder(name, seed).model("dense")
        if not path.is_file():
            raise ValueError(f"expected the weights of {name}, seed {seed}, in {path}, found nothing there; {_AGAIN}")
        return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items() if inner != {}}
    return value
