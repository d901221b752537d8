from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gatedconv.cli import main
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
def no_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take longer than all the rest of a short run."""
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "blobs.npz")


@pytest.fixture
def quick(archive: Path) -> list[object]:
    """Flags of a run of seconds."""
    return ["--data", f"npz:{archive}", "--epochs", 2, "--batch-size", 16, "--no-latency", "--mac-weight", 1]
