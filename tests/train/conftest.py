from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from gatedconv import models
from gatedconv.data import ImageData, load_data
from gatedconv.models import BUILDERS, ResNet
from tests.image_files import write_npz


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Tiny networks are fastest, and exactly repeatable, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for ResNet-20 gets a network with one block a stage, which can be read back."""
    builder = partial(ResNet, 8)
    monkeypatch.setattr(models, "resnet20", builder)
    monkeypatch.setitem(BUILDERS, "resnet8", builder)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "blobs.npz")


@pytest.fixture
def data(archive: Path) -> ImageData:
    return load_data(f"npz:{archive}")
