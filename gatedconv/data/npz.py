"""`npz:PATH`: one NumPy archive with the keys of the MedMNIST files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatedconv.data.image_data import Augment, ImageData, make_image_data
from gatedconv.data.image_files import DataError

_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_VALIDATION = ("val_images", "val_labels")
# What NumPy raises for a file that is no archive, a truncated archive or a damaged member.
_DAMAGED = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError)


def load_npz(path: str | Path) -> ImageData:
    """Read `train_images`, `train_labels`, `test_images`, `test_labels` from a NumPy archive.

    Images are uint8 (N, H, W) or (N, H, W, C); labels are whole numbers (N,) or (N, 1). Optional:
    `val_images`, `val_labels`, and `class_names`. Augmentation: random crops after padding by an eighth of
    the side; left-right flips for color images only, because gray ones are often digits or letters.

    Raises:
        DataError: naming the file, the key, what was expected and what was found.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected an .npz file, found {'a folder' if path.is_dir() else 'nothing there'}")
    try:
        archive = np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise DataError(f"{path}: expected an .npz archive, found a damaged or different file ({error})") from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: expected an .npz archive with {', '.join(_REQUIRED)}, found a single .npy array")
    with archive:
        wanted = (*_REQUIRED, *_VALIDATION) if set(_VALIDATION) & set(archive) else _REQUIRED
        missing = [key for key in wanted if key not in archive]
        if missing:
            raise DataError(
                f"{path}: missing key {missing[0]}; expected {', '.join(wanted)}, found {', '.join(archive)}"
            )
        train, test = _split(path, archive, "train"), _split(path, archive, "test")
        val = _split(path, archive, "val") if wanted != _REQUIRED else None
        names = _class_names(path, archive) if "class_names" in archive else ()
    found = torch.cat([train[1], test[1]])
    if len(found) and int(found.min()) == 1:
        raise DataError(
            f"{path}: train_labels: expected labels that begin at 0, found 1 to {int(found.max())}; "
            f"subtract 1 from every label"
        )
    channels, height = train[0].shape[1:3]
    return make_image_data(str(path), train, test, Augment(pad=max(1, height // 8), flip=channels == 3), names, val)


def _split(path: Path, archive: Any, split: str) -> tuple[Tensor, Tensor]:
    images = _member(path, archive, f"{split}_images")
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
    labels = _member(path, archive, f"{split}_labels")
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


def _class_names(path: Path, archive: Any) -> tuple[str, ...]:
    names = _member(path, archive, "class_names")
    if names.ndim != 1 or len(names) == 0:
        raise DataError(f"{path}: class_names: expected shape (classes,), found {names.shape}")
    return tuple(str(name) for name in names)


def _member(path: Path, archive: Any, key: str) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(archive[key])
    except _DAMAGED as error:
        raise DataError(f"{path}: {key}: expected a readable array, found damaged data ({error})") from None
