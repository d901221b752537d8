"""The folder of a run: its file names, its lock, its records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gatedconv._io import NUMBER, locked, naming_file, remove_leftovers, require_schema, write_atomic, write_json_lines
from gatedconv.train.checkpoint import has_checkpoint
from gatedconv.train.config import TrainConfig, make_config, read_toml, require_same_recipe, to_toml
from gatedconv.train.metrics import EpochMetrics

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
# The keys of summary.json that are read.
_SUMMARY = {
    "dense?": _FIGURES,
    "frozen?": _FIGURES,
    "agreement?": NUMBER,
    "macs_conv_dense?": NUMBER,
    "images?": {"classes": list, "mean": list, "std": list},
}


class RunFolder:
    """Paths of a run.

    config.toml        every setting
    metrics.jsonl      one line per epoch and phase
    checkpoint/        dense.pt, gated.pt, compact.pt and, of each, the previous one
    consensus.json     which gates stayed open, and their agreement
    summary.json       the results
    plots/             figures
    *.safetensors, compact.onnx, compact.pt2
    .lock              empty; locked while a process trains the run
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics = path / "config.toml", path / "metrics.jsonl"
        self.consensus, self.summary, self.plots = path / "consensus.json", path / "summary.json", path / "plots"

    def checkpoint(self, phase: str) -> Path:
        """Newest checkpoint of a phase."""
        return self.path / "checkpoint" / f"{phase}.pt"

    def model(self, kind: str) -> Path:
        """Saved model: kind is dense, gated or compact."""
        return self.path / f"{kind}.safetensors"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file() or self.holds_checkpoint()

    def holds_checkpoint(self) -> bool:
        """Whether there is a checkpoint of any phase."""
        return any(has_checkpoint(self.checkpoint(phase)) for phase in ("dense", "gated"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock against other processes, while it is trained or frozen; reentrant within a thread.

        Raises:
            ValueError: another process, or another thread of this one, holds it.
            OSError: the folder cannot be written.
        """
        message = f"{self.path}: another process trains this run; wait until it has ended, or end it"
        with naming_file(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path.resolve() / ".lock", held=message):
            yield

    def begin(self, config: TrainConfig, *, resume: bool) -> None:
        """Start or resume a run in the folder and write its config.

        Raises:
            ValueError: see `require_startable`; or the run to resume has another recipe.
            OSError: the folder cannot be written.
        """
        self.require_startable(resume=resume)
        if resume:
            remove_leftovers(self.path)
            stored = self.read_config()
            require_same_recipe(vars(stored), config, f"{self.config}: a run keeps its recipe")
            if stored == config:
                return
        write_atomic(self.config, to_toml(config).encode())

    def require_startable(self, *, resume: bool) -> None:
        """Check that there is a run to resume, or none where a new one starts: ValueError otherwise."""
        if resume and not self.holds_run():
            raise ValueError(f"{self.path}: expected a run to resume, found none")
        if not resume and self.holds_run():
            raise ValueError(f"{self.path}: holds a run already; resume it with --resume, or choose another folder")

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
                    break  # incomplete after a crash: a resumed run writes it again
                raise ValueError(f"{self.metrics}: line {number} is damaged ({error})") from None
            found.append(EpochMetrics.from_dict(record, f"{self.metrics}: line {number}"))
        return found

    def read_summary(self) -> dict[str, Any]:
        """The results of the run.

        Raises:
            ValueError: the run has none yet, or it is damaged.
        """
        if not self.summary.is_file():
            raise ValueError(f"{self.path}: expected a finished run with summary.json, found none")
        try:
            summary: dict[str, Any] = json.loads(_read_text(self.summary))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.summary}: expected JSON, found damaged text ({error})") from None
        require_schema(summary, _SUMMARY, str(self.summary))
        if "frozen" in summary:
            require_schema(summary, {"agreement": NUMBER}, str(self.summary))
        return summary

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the results; atomic."""
        write_atomic(self.summary, (json.dumps(summary, indent=2) + "\n").encode())


class MetricsWriter:
    """Writes metrics.jsonl, kept consistent with the checkpoints.

    A resumed phase writes its earlier epochs again, from its checkpoint: its first line replaces all lines of the
    phase. Lines of other phases are kept until those phases resume.

    Args:
        path: of the file.
        earlier: its lines, where a run is resumed.
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
            write_json_lines(self.path, [line.as_dict() for line in (*self._written, *kept)])
        else:
            with naming_file(self.path), open(self.path, "a" if begun else "w", encoding="utf-8") as file:
                file.write(json.dumps(metrics.as_dict()) + "\n")
        self._kept = kept


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found a damaged or different file ({error})") from None
