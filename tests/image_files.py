"""Small image archives for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def blobs(count: int, classes: int = 3, side: int = 8, channels: int = 0, seed: int = 0) -> tuple[Any, Any]:
    """Easy classes: noise with one bright row, whose place is the label. uint8 images, int64 labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    shape = (count, side, side, channels) if channels else (count, side, side)
    images = random.integers(0, 60, shape, dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 150
    return images, labels


def write_npz(path: Path, **changes: Any) -> Path:
    """A MedMNIST-like archive of 48 train and 24 test images; `changes` replace keys, None removes one."""
    train, test = blobs(48, seed=1), blobs(24, seed=2)
    arrays: dict[str, Any] = {
        "train_images": train[0],
        "train_labels": train[1],
        "test_images": test[0],
        "test_labels": test[1],
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path
