"""From the name of a data source to its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gatedconv.data.image_data import Augment, ImageData, make_image_data, stratified_split
from gatedconv.data.image_files import DataError
from gatedconv.data.imagefolder import load_imagefolder
from gatedconv.data.npz import load_npz

SOURCES = "digits, cifar10, cifar100, npz:PATH or imagefolder:PATH"
_DIGITS_TEST_SHARE = 0.25


def load_data(
    source: str,
    *,
    root: str | Path = "data",
    seed: int = 0,
    image_size: int = 32,
    workers: int | None = None,
    image_range: float = 0.0,
) -> ImageData:
    """Load a data source as uint8 images, into memory unless `workers` leaves them in their files.

    Args:
        source: `digits` (scikit-learn's bundled scans, 8x8 gray), `cifar10`, `cifar100` (torchvision,
            downloaded to `root`), `npz:PATH` or `imagefolder:PATH`.
        root: folder for downloads.
        seed: seed of the train/test split, for sources that have none of their own (`digits`).
        image_size: side in pixels to which `imagefolder` images are scaled; the other sources keep theirs.
        workers: of `imagefolder`: processes that decode images batch by batch; None decodes them all now.
        image_range: of `imagefolder`: the brightest value of images of more than 8 bits; 0 for their type's.

    Raises:
        DataError: the source is unknown, missing, damaged or not of the expected form.
        ImportError: the package that reads this source is not installed.
    """
    kind, _, path = source.partition(":")
    if kind in ("npz", "imagefolder"):
        if not path:
            raise DataError(f"data: expected {kind}:PATH, got {source!r}")
        return load_npz(path) if kind == "npz" else load_imagefolder(path, image_size, workers, image_range)
    if source == "digits":
        return _load_digits(seed)
    if source in ("cifar10", "cifar100"):
        return _load_cifar(source, Path(root))
    raise DataError(f"data: unknown source {source!r}; expected {SOURCES}")


def _load_digits(seed: int) -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("data 'digits' needs scikit-learn: pip install 'gatedconv[demo]'") from None
    scans: Any = load_digits()
    # Ink is counted in 0..16 per 4x4 patch of the original scan; 16 becomes 255.
    images = torch.from_numpy(scans.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(scans.target).long()
    train, test = stratified_split(labels, _DIGITS_TEST_SHARE, seed)
    # One pixel is an eighth of these scans; a mirrored digit is not a digit.
    augment = Augment(pad=1, flip=False)
    return make_image_data("digits", (images[train], labels[train]), (images[test], labels[test]), augment)


def _load_cifar(name: str, root: Path) -> ImageData:
    try:
        from torchvision import datasets
    except ImportError:
        raise ImportError(f"data {name!r} needs torchvision: pip install torchvision") from None
    reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        splits = [reader(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:  # urllib, tarfile and pickle each have their own; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{root}: {name}: could not be downloaded or read ({reason})") from None
    train, test = (
        (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)) for split in splits
    )
    return make_image_data(name, train, test, Augment(pad=4, flip=True), tuple(splits[0].classes))
