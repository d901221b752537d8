"""The runtime's package, built from this checkout, and plans to run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import gatedconv
from gatedconv import _build
from tests.engine.nets import settle

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def require_compiler() -> str:
    """The C++ compiler; the test is skipped where there is none."""
    try:
        return _build.find_compiler()
    except _build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the built package, as a wheel does; objects of the engine's build are used again."""
    require_compiler()
    folder = tmp_path_factory.mktemp("runtime")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        folder / "base",
        "--build-lib",
        folder / "lib",
    ]
    done = subprocess.run(command, cwd=ROOT / "runtime", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


@pytest.fixture(scope="session")
def rt(package: Path) -> ModuleType:
    """The runtime's package."""
    sys.path.insert(0, str(package))
    try:
        return importlib.import_module("gatedconv_runtime")
    finally:
        sys.path.remove(str(package))


def small_net() -> nn.Module:
    """A network with convolutions of every kernel, a residual and two activations: (N, 3, H, W) -> (N, 5)."""
    torch.manual_seed(0)
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 20, 3, 2, 1),
            nn.BatchNorm2d(20),
            nn.SiLU(),
            nn.Conv2d(20, 20, 3, 1, 1, groups=20),
            nn.ReLU(),
            nn.Conv2d(20, 24, 3, 1, 1),
            nn.ReLU6(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 5),
        )
    )


Export = Callable[..., Path]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Write a model's plan; returns the file."""

    def write(model: nn.Module, example: Tensor = X, **about: object) -> Path:
        path = tmp_path / "net.plan"
        gatedconv.export(model, path, example, format="plan", **about)
        return path

    return write


@pytest.fixture(scope="session")
def plan_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The small network's file."""
    path = tmp_path_factory.mktemp("plan") / "small.plan"
    classes = ("cat", "dog", "Füchsin", 'a "b"\\', "e")
    gatedconv.export(small_net(), path, X, format="plan", classes=classes, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.1))
    return path.read_bytes()
