"""`imagefolder:PATH`: train/CLASS/*.png and test/CLASS/*.png (or val/ in the place of test/)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from gatedconv.data.errors import DataError
from gatedconv.data.image_data import Augment, ImageData, Images, make_image_data
from gatedconv.data.image_files import FileImages

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_imagefolder(path: str | Path, image_size: int, workers: int | None = None) -> ImageData:
    """Read a folder of images, as RGB, shorter side scaled to `image_size`, centre cropped.

    Args:
        path: holds train/ and test/ (or val/), each with one folder per class.
        image_size: height and width of the result in pixels.
        workers: None decodes everything into memory now; else images stay in their files, and so many
            processes decode them batch by batch.

    Raises:
        DataError: naming the file or folder, what was expected and what was found.
        ImportError: Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("data 'imagefolder' needs Pillow: pip install pillow")
    path = Path(path)
    test_name = "test" if (path / "test").is_dir() else "val"
    for split in ("train", test_name):
        if not (path / split).is_dir():
            wanted = "train/" if split == "train" else "test/ or val/"
            raise DataError(f"{path}: expected a folder {wanted} with one folder per class, found none")
    names = tuple(_classes(path / "train"))
    val = None
    if test_name == "test" and (path / "val").is_dir():
        val = _read_split(path / "val", names, image_size, workers)
    train = _read_split(path / "train", names, image_size, workers)
    test = _read_split(path / test_name, names, image_size, workers)
    return make_image_data(str(path), train, test, Augment(pad=max(1, image_size // 8), flip=True), names, val)


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise DataError(f"{folder}: expected one folder per class, found none")
    return names


def _read_split(folder: Path, names: tuple[str, ...], size: int, workers: int | None) -> tuple[Images, Tensor]:
    unknown = [name for name in _classes(folder) if name not in names]
    if unknown:
        raise DataError(f"{folder / unknown[0]}: expected only classes that train/ has, found class {unknown[0]!r}")
    files = [
        (file, label)
        for label, name in enumerate(names)
        if (folder / name).is_dir()
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise DataError(f"{folder}: expected image files ({', '.join(SUFFIXES)}), found none")
    images = FileImages([file for file, _ in files], size, workers or 0)
    labels = torch.tensor([label for _, label in files])
    return images.decode() if workers is None else images, labels
