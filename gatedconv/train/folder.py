"""The folder that a run writes: one place that knows its file names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatedconv._io import remove_leftovers, write_atomic
from gatedconv.train.checkpoint import has_checkpoint, naming_file
from gatedconv.train.claim import claimed
from gatedconv.train.config import TrainConfig, make_config, read_toml, require_same_recipe, to_toml
from gatedconv.train.metrics import EpochMetrics
from gatedconv.train.record import NUMBER, require_form

_LATENCY = {"1?": NUMBER, "32?": NUMBER}
_FIGURES = {
    "top1": NUMBER,
    "macs": NUMBER,
    "macs_conv?": NUMBER,
    "params": NUMBER,
    "latency_ms?": _LATENCY,
    "engine_latency_ms?": _LATENCY,
    "energy_j?": (dict, type(None)),
    "energy_j_image?": (*NUMBER, type(None)),
}
# What reports read of summary.json.
_SUMMARY = {"dense?": _FIGURES, "frozen?": _FIGURES, "agreement?": NUMBER, "macs_conv_dense?": NUMBER}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    config.toml        every setting
    metrics.jsonl      one line per epoch and training
    checkpoint/        dense.pt, gated.pt and, of each, the one before
    consensus.json     which gates stayed open, and what they agreed on
    summary.json       the outcome
    plots/             pictures
    *.safetensors, compact.onnx, compact.pt2
    """

    path: Path

    @property
    def config(self) -> Path:
        """Settings as TOML."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def consensus(self) -> Path:
        """Which gates stayed open."""
        return self.path / "consensus.json"

    @property
    def summary(self) -> Path:
        """The outcome as JSON."""
        return self.path / "summary.json"

    @property
    def plots(self) -> Path:
        """Folder of pictures."""
        return self.path / "plots"

    def checkpoint(self, phase: str) -> Path:
        """Newest checkpoint of a training."""
        return self.path / "checkpoint" / f"{phase}.pt"

    def model(self, kind: str) -> Path:
        """Saved model: kind is dense, gated or compact."""
        return self.path / f"{kind}.safetensors"

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file() or self.holds_checkpoint()

    def holds_checkpoint(self) -> bool:
        """Whether an epoch of any training was finished here."""
        return any(has_checkpoint(self.checkpoint(phase)) for phase in ("dense", "gated"))

    def claimed(self) -> AbstractContextManager[None]:
        """Hold the folder against other processes while a run is trained and told of; see `claim.claimed`."""
        return claimed(self.path)

    def begin(self, config: TrainConfig, *, resume: bool) -> None:
        """Give the folder to a run and write its config: config.toml always tells what is trained.

        Raises:
            ValueError: it holds another run, or there is none to resume, or that has another recipe.
            OSError: it cannot be written.
        """
        if resume and not self.holds_run():
            raise ValueError(f"{self.path}: expected a run to resume, found none")
        if not resume and self.holds_run():
            raise ValueError(f"{self.path}: holds a run already; go on with --resume, or choose another folder")
        if resume:
            remove_leftovers(self.path)
            stored = self.read_config()
            require_same_recipe(vars(stored), config, f"{self.config}: a run keeps its recipe")
            if stored == config:
                return
        write_atomic(self.config, to_toml(config).encode())

    def read_config(self) -> TrainConfig:
        """The settings of the run.

        Raises:
            ValueError: there are none, or they are damaged.
        """
        if not self.config.is_file():
            raise ValueError(f"{self.path}: expected a run folder with config.toml, found none")
        return make_config(read_toml(self.config), where=str(self.config))

    def read_metrics(self) -> list[EpochMetrics]:
        """Metrics of every epoch so far, in order; empty if none was finished.

        Raises:
            ValueError: a line is damaged.
        """
        if not self.metrics.is_file():
            return []
        lines = _read_text(self.metrics).splitlines()
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break  # cut off by a crash: a resumed run writes it again
                raise ValueError(f"{self.metrics}: line {number} is damaged ({error})") from None
            found.append(EpochMetrics.from_dict(record, f"{self.metrics}: line {number}"))
        return found

    def read_summary(self) -> dict[str, Any]:
        """The outcome of the run.

        Raises:
            ValueError: the run has none yet, or it is damaged.
        """
        if not self.summary.is_file():
            raise ValueError(f"{self.path}: expected a finished run with summary.json, found none")
        try:
            summary: dict[str, Any] = json.loads(_read_text(self.summary))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.summary}: expected JSON, found damaged text ({error})") from None
        require_form(summary, _SUMMARY, str(self.summary))
        if "frozen" in summary:
            require_form(summary, {"agreement": NUMBER}, str(self.summary))
        return summary

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the outcome, whole or not at all."""
        write_atomic(self.summary, (json.dumps(summary, indent=2) + "\n").encode())


class MetricsWriter:
    """Writes metrics.jsonl, which tells what the checkpoints know.

    A resumed training yields its finished epochs again, from its checkpoint: with its first line, all that the file
    told of this training goes. Lines of other trainings stay until those are gone on with.

    Args:
        path: of the file.
        earlier: its lines, where a run goes on.
    """

    def __init__(self, path: Path, earlier: Sequence[EpochMetrics] = ()) -> None:
        self.path = path
        self._written: list[EpochMetrics] = []
        self._kept = list(earlier)

    def write(self, metrics: EpochMetrics) -> None:
        """Add one line.

        Raises:
            OSError: the disk is full or not writable.
        """
        begun = bool(self._written)
        self._written.append(metrics)
        kept = [line for line in self._kept if line.phase != metrics.phase]
        if kept or len(kept) < len(self._kept):
            write_atomic(self.path, "".join(map(_line, [*self._written, *kept])).encode())
        else:
            with naming_file(self.path), open(self.path, "a" if begun else "w", encoding="utf-8") as file:
                file.write(_line(metrics))
        self._kept = kept


def _line(metrics: EpochMetrics) -> str:
    return json.dumps(metrics.as_dict()) + "\n"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found a damaged or different file ({error})") from None
