"""What a call of training is asked for, from the environment; `experiments` lists the names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.data import found_sources, store_folder
from benchmarks.gpu.session import ROOT
from reproduce.files import Key, dataset_name
from reproduce.rows import recipe_settings
from reproduce.runner import select
from reproduce.table import find_experiment

DEFAULT = "headline-r56-c10*"


@dataclass(frozen=True)
class Settings:
    """A call; paths are absolute.

    Attributes:
        keys: the runs that are asked for.
        jobs: processes side by side.
        minutes: after which runs stop with a checkpoint.
        device: as in `TrainConfig`.
        sources: where data sets lie.
        before: archives of earlier calls, or folders of them.
        out: folder for archives.
        work: folder of run folders and ledger.
        amp: as in `TrainConfig`; "" for each recipe's own.
        cuda_graph: as in `TrainConfig`.
    """

    keys: list[Key]
    jobs: int
    minutes: float
    device: str
    sources: dict[str, str]
    before: list[Path]
    out: Path
    work: Path
    amp: str = ""
    cuda_graph: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str], folder: Path) -> Settings:
        """The settings; relative paths are below ``folder``.

        Raises:
            ValueError: a value that cannot be, or a data set without a source; names the variable.
        """

        def path(name: str, default: str) -> Path:
            return folder / environment[name] if environment.get(name) else ROOT / default

        seeds = _numbers(environment, "SEEDS")
        keys = select((environment.get("EXPERIMENTS") or DEFAULT).split(), seeds or None)
        settings = cls(
            keys,
            jobs=(_numbers(environment, "JOBS") or [3])[0],
            minutes=_minutes(environment.get("MINUTES") or "7.5"),
            device=environment.get("DEVICE") or "cuda",
            sources=found_sources(store_folder(environment)) | _sources(environment.get("SOURCES") or "", folder),
            before=[folder / place for place in (environment.get("FROM") or "").split()],
            out=path("OUT", "runs/gpu-packs"),
            work=path("WORK", "runs/gpu"),
            amp=environment.get("AMP") or "",
            cuda_graph=(environment.get("CUDA_GRAPH") or "0") != "0",
        )
        if settings.amp not in ("", "off", "auto", "bf16", "fp16"):
            raise ValueError(f"AMP: expected off, auto, bf16 or fp16, got {settings.amp!r}")
        if settings.jobs < 1:
            raise ValueError(f"JOBS: expected at least 1, got {settings.jobs}")
        if settings.work.resolve().is_relative_to(settings.out.resolve()):
            raise ValueError(f"WORK: expected a folder outside of OUT ({settings.out}), got {settings.work}")
        settings.require_data()
        return settings

    def require_data(self) -> None:
        """Check that every data set has a source; ValueError where one has none."""
        recipes = [recipe_settings(find_experiment(experiment)) for experiment, _ in self.keys]
        for name in sorted({dataset_name(recipe["data"]) for recipe in recipes}):
            if name not in self.sources:
                raise ValueError(
                    f"SOURCES: expected a source of {name}, such as {name}=npz:data/{name}.npz; none is in STORE either"
                )


def _sources(text: str, folder: Path) -> dict[str, str]:
    found = {}
    for each in text.split():
        name, equals, source = each.partition("=")
        kind, _, place = source.partition(":")
        if not name or not equals or not source:
            raise ValueError(f"SOURCES: expected NAME=SOURCE, got {each!r}")
        if place and not (folder / place).exists():
            raise ValueError(f"SOURCES: {name}: found nothing at {folder / place}")
        found[name] = f"{kind}:{folder / place}" if place else source
    return found


def _numbers(environment: Mapping[str, str], name: str) -> list[int]:
    text = environment.get(name) or ""
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise ValueError(f"{name}: expected whole numbers, got {text!r}") from None


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(f"MINUTES: expected a number above 0, got {text!r}")
    return minutes
