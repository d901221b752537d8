from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gatedconv.data import ImageData, load_data
from tests.image_files import write_npz


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Tiny networks are fastest, and exactly repeatable, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "blobs.npz")


@pytest.fixture
def data(archive: Path) -> ImageData:
    return load_data(f"npz:{archive}")
