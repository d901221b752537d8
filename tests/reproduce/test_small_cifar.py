from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gatedconv.data import load_data
from reproduce.small_cifar import write


def test_squares_are_averaged_and_splits_do_not_overlap(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(12) % 3
    np.savez(
        tmp_path / "whole.npz", train_images=images, train_labels=labels, test_images=images[:3], test_labels=labels[:3]
    )
    write(f"npz:{tmp_path / 'whole.npz'}", tmp_path / "small.npz", train=6, validation=4)
    found = np.load(tmp_path / "small.npz")
    expected = np.floor(images.astype(float).reshape(12, 16, 2, 16, 2, 3).mean((2, 4)) + 0.5)
    for name, part in (("train", slice(0, 6)), ("val", slice(6, 10)), ("test", slice(0, 3))):
        assert np.array_equal(found[f"{name}_images"], expected[part])
        assert np.array_equal(found[f"{name}_labels"], labels[part])
    data = load_data(f"npz:{tmp_path / 'small.npz'}")
    assert data.val_images is not None and len(data.val_images) == 4
    with pytest.raises(ValueError, match="expected 40000 training images in memory, got 12"):
        write(f"npz:{tmp_path / 'whole.npz'}", tmp_path / "none.npz")
