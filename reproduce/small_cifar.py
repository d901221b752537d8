"""The images of the bench for two CPU cores: ``python -m reproduce.small_cifar SOURCE cifar10-16x16-25k.npz``.

SOURCE is CIFAR-10 as ``gatedconv train --data`` takes it: ``cifar10`` or ``npz:PATH``. Train: its first 25,000 training
images, each square of 2 x 2 pixels averaged; validation, for choices: the next 15,000; test: all 10,000.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gatedconv.data import load_data

TRAIN, VALIDATION = 25_000, 15_000


def halved(images: Tensor) -> NDArray[np.uint8]:
    """uint8 (N, C, H, W) -> (N, H / 2, W / 2, C), the rounded mean of each 2 x 2 pixels."""
    count, channels, height, width = images.shape
    squares = images.numpy().reshape(count, channels, height // 2, 2, width // 2, 2).astype(np.uint16)
    means: NDArray[np.uint8] = ((squares.sum((3, 5)) + 2) // 4).astype(np.uint8)
    return means.transpose(0, 2, 3, 1)


def write(source: str, path: Path, train: int = TRAIN, validation: int = VALIDATION) -> None:
    """Write the file; DataError for a source that cannot be read, ValueError for one with too few images."""
    data = load_data(source)
    images, tests, labels = data.train_images, data.test_images, data.train_labels.numpy()
    if not isinstance(images, Tensor) or not isinstance(tests, Tensor) or len(images) < train + validation:
        raise ValueError(f"{source}: expected {train + validation} training images in memory, got {len(images)}")
    held_out = slice(train, train + validation)
    np.savez(
        path,
        train_images=halved(images[:train]),
        train_labels=labels[:train],
        val_images=halved(images[held_out]),
        val_labels=labels[held_out],
        test_images=halved(tests),
        test_labels=data.test_labels.numpy(),
        class_names=np.array(data.class_names),
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write(sys.argv[1], Path(sys.argv[2]))
