from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from gatedconv.cli import main
from reproduce import checks as experiment_checks
from reproduce import energy as experiment_energy
from reproduce import rows as experiment_rows
from reproduce import runner as experiments
from reproduce.files import Bench
from reproduce.table import all_experiments
from tests.image_files import write_npz


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def gatedconv(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command in this process, on one thread."""

    def call(*arguments: object) -> Result:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        finally:
            torch.set_num_threads(before)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "blobs.npz")


@pytest.fixture
def quick(archive: Path) -> list[object]:
    """Flags of a run of seconds."""
    return ["--data", f"npz:{archive}", "--epochs", 2, "--batch-size", 16, "--no-latency", "--mac-weight", 1]


# ---- the experiment table, its rows made small
TINY = {
    "epochs": 2, "batch_size": 16, "model": "resnet20", "latency": False, "device": "cpu", "amp": "off", "threads": 1,
    "warmup_epochs": 0.0, "lr": 0.05,
}  # fmt: skip


def stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Let a few images of 8x8 stand for any data set, of which a gate of a small network is no small part."""
    patch.setattr(experiment_checks, "KNOWN_IMAGES", {})
    patch.setitem(experiment_checks.MACS_APART, "equal_macs", 0.5)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose rows are tiny: two epochs of ResNet-20 on a few images of 8x8."""
    archive = write_npz(tmp_path / "blobs.npz")
    tiny = {name: replace(each, settings={**each.settings, **TINY}) for name, each in all_experiments().items()}
    for module in (experiments, experiment_rows, experiment_energy):
        monkeypatch.setattr(module, "find_experiment", tiny.__getitem__)
    monkeypatch.setattr("gatedconv.train.finish.write_exports", lambda *_: [])
    stand_ins(monkeypatch)
    names = ("cifar10", "cifar100", "cifar10-16x16-25k")
    return Bench(tmp_path / "runs", tmp_path / "results", {name: f"npz:{archive}" for name in names})
