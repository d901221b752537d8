"""A workplace whose rows are tiny: two epochs of ResNet-20 on a few images of 8x8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reproduce import checks, rows, runner
from reproduce.experiments import all_experiments
from reproduce.workplace import Workplace
from tests.image_files import write_npz

TINY = {
    "epochs": 2,
    "batch_size": 16,
    "model": "resnet20",
    "latency": False,
    "device": "cpu",
    "amp": "off",
    "threads": 1,
    "warmup_epochs": 0.0,
    "lr": 0.05,
}


def stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Accept a few images of 8x8 as any data set; one gate of a small network is a large part of its MACs."""
    patch.setattr(checks, "KNOWN_IMAGES", {})
    patch.setitem(checks.MACS_APART, "equal_macs", 0.5)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    archive = write_npz(tmp_path / "blobs.npz")
    tiny = {name: replace(each, settings={**each.settings, **TINY}) for name, each in all_experiments().items()}
    for module in (runner, rows):
        monkeypatch.setattr(module, "find_experiment", tiny.__getitem__)
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])
    stand_ins(monkeypatch)
    names = ("cifar10", "cifar100", "cifar10-16x16-25k")
    return Workplace(tmp_path / "runs", tmp_path / "results", {name: f"npz:{archive}" for name in names})
