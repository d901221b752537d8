"""From the name of a data source to its images; folders of images are in `imagefolder`."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatedconv.data.image_data import Augment, ImageData, make_image_data, stratified_split
from gatedconv.data.image_files import DataError
from gatedconv.data.imagefolder import load_imagefolder

SOURCES = "digits, cifar10, cifar100, npz:PATH or imagefolder:PATH"
_DIGITS_TEST_SHARE = 0.25
_NPZ_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_NPZ_VALIDATION = ("val_images", "val_labels")
# What NumPy raises for a file that is no archive, a truncated archive or a damaged member.
_NPZ_DAMAGED = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError)


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
        return _load_npz(Path(path)) if kind == "npz" else load_imagefolder(path, image_size, workers, image_range)
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


def _load_npz(path: Path) -> ImageData:
    """Read a NumPy archive with the keys of the MedMNIST files.

    `train_images`, `train_labels`, `test_images`, `test_labels`; optional: `val_images`, `val_labels`, `class_names`.
    Images are uint8 (N, H, W) or (N, H, W, C); labels are whole numbers (N,) or (N, 1). Augmentation: random crops
    after padding by an eighth of the side; left-right flips for color images only, because gray ones are often digits
    or letters.

    Raises:
        DataError: naming the file, the key, what was expected and what was found.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected an .npz file, found {'a folder' if path.is_dir() else 'nothing there'}")
    try:
        archive = np.load(path, allow_pickle=False)
    except _NPZ_DAMAGED as error:
        raise DataError(f"{path}: expected an .npz archive, found a damaged or different file ({error})") from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: expected an .npz archive with {', '.join(_NPZ_REQUIRED)}, found a single .npy array")
    with archive:
        wanted = (*_NPZ_REQUIRED, *_NPZ_VALIDATION) if set(_NPZ_VALIDATION) & set(archive) else _NPZ_REQUIRED
        missing = [key for key in wanted if key not in archive]
        if missing:
            raise DataError(
                f"{path}: missing key {missing[0]}; expected {', '.join(wanted)}, found {', '.join(archive)}"
            )
        train, test = _npz_split(path, archive, "train"), _npz_split(path, archive, "test")
        val = _npz_split(path, archive, "val") if wanted != _NPZ_REQUIRED else None
        names = _npz_class_names(path, archive) if "class_names" in archive else ()
    found = torch.cat([train[1], test[1]])
    if len(found) and int(found.min()) == 1:
        raise DataError(
            f"{path}: train_labels: expected labels that begin at 0, found 1 to {int(found.max())}; "
            f"subtract 1 from every label"
        )
    channels, height = train[0].shape[1:3]
    return make_image_data(str(path), train, test, Augment(pad=max(1, height // 8), flip=channels == 3), names, val)


def _npz_split(path: Path, archive: Any, split: str) -> tuple[Tensor, Tensor]:
    images = _npz_member(path, archive, f"{split}_images")
    if images.dtype != np.uint8:
        raise DataError(f"{path}: {split}_images: expected dtype uint8 (0..255), found {images.dtype}")
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: {split}_images: expected shape (N, H, W) or (N, H, W, C), found {images.shape}")
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] > 4 or 0 in images.shape[1:]:
        raise DataError(
            f"{path}: {split}_images: expected channels last, (N, H, W, C) with 1 to 4 channels, found {images.shape}"
        )
    labels = _npz_member(path, archive, f"{split}_labels")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: {split}_labels: expected whole numbers, found dtype {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{path}: {split}_labels: expected shape (N,) or (N, 1), found {labels.shape}")
    if labels.dtype == np.uint64 and labels.max(initial=0) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: {split}_labels: expected labels below 2**63, found {labels.max()}")
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(planes), torch.from_numpy(labels.astype(np.int64))


def _npz_class_names(path: Path, archive: Any) -> tuple[str, ...]:
    names = _npz_member(path, archive, "class_names")
    if names.ndim != 1 or len(names) == 0:
        raise DataError(f"{path}: class_names: expected shape (classes,), found {names.shape}")
    return tuple(str(name) for name in names)


def _npz_member(path: Path, archive: Any, key: str) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(archive[key])
    except _NPZ_DAMAGED as error:
        raise DataError(f"{path}: {key}: expected a readable array, found damaged data ({error})") from None
