"""`imagefolder:PATH`: train/CLASS/*.png and test/CLASS/*.png (or val/ in the place of test/)."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gatedconv.data.image_data import Augment, ImageData, Images, make_image_data
from gatedconv.data.image_files import DEEP_COLOR, DataError, FileImages, brightest, shown

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SAMPLE = 32  # files whose range of values is looked at


def load_imagefolder(
    path: str | Path, image_size: int, workers: int | None = None, image_range: float = 0.0
) -> ImageData:
    """Read a folder of images, as RGB, upright, shorter side scaled to `image_size`, center cropped.

    Classes and images come in the order of torchvision's ImageFolder, those of sub-folders included. Hidden files and
    folders are skipped; one warning for each split names other files that are skipped, sub-folders and
    classes without images, which are left out.

    Args:
        path: holds train/ and test/ (or val/), each with one folder per class.
        image_size: height and width of the result in pixels.
        workers: None decodes everything into memory now; else images stay in their files, and so many
            processes decode them batch by batch.
        image_range: the brightest value of images of more than 8 bits, which becomes 255; 0 for their type's: 65535
            for whole numbers, 1 for floating-point ones.

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
            raise DataError(f"{shown(path)}: expected a folder {wanted} with one folder per class, found none")
    folders = _classes(path / "train")
    names = tuple(name for name in folders if _find(path / "train", [name]).files)
    if empty := [name for name in folders if name not in names]:
        if not names:
            raise DataError(f"{shown(path / 'train')}: expected image files ({', '.join(SUFFIXES)}), found none")
        without = ", ".join(map(shown, empty))
        warnings.warn(f"{shown(path / 'train')}: classes without images are left out: {without}", stacklevel=3)
    val = None
    if test_name == "test" and (path / "val").is_dir():
        val = _read_split(path / "val", names, empty, image_size, workers, image_range)
    train = _read_split(path / "train", names, empty, image_size, workers, image_range)
    test = _read_split(path / test_name, names, empty, image_size, workers, image_range)
    return make_image_data(str(path), train, test, Augment(pad=max(1, image_size // 8), flip=True), names, val)


def _classes(folder: Path) -> list[str]:
    """Names of the folders in it, in torchvision's order, without hidden ones."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{shown(folder)}: expected one folder per class, found none")
    return names


@dataclass
class _Found:
    """The images of a split, (file, label), and what was left out or is unusual."""

    files: list[tuple[Path, int]] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    nested: set[str] = field(default_factory=set)

    def remarks(self) -> list[str]:
        """Sentences about the files that were skipped and the images in sub-folders."""
        found = []
        if self.skipped:
            more = f" and {len(self.skipped) - 1} more" if len(self.skipped) > 1 else ""
            found.append(f"files that are no images are skipped: {shown(self.skipped[0].name)}{more}")
        if self.nested:
            found.append(f"images in sub-folders count for their class: {', '.join(map(shown, sorted(self.nested)))}")
        return found


def _find(folder: Path, names: Sequence[str]) -> _Found:
    """The images below each class's folder, in the order in which torchvision's ImageFolder reads them."""
    found = _Found()
    for label, name in enumerate(names):
        for place, files in sorted(_walk(folder / name)):
            if any(part.startswith(".") for part in Path(place).relative_to(folder).parts):
                continue
            for file in sorted(files):
                if file.startswith("."):
                    continue
                path = Path(place, file)
                if path.suffix.lower() not in SUFFIXES:
                    found.skipped.append(path)
                    continue
                found.files.append((path, label))
                if Path(place) != folder / name:
                    found.nested.add(name)
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders below one, links followed, and their files; no folder is entered again from within itself."""
    for place, inner, files in os.walk(folder, followlinks=True):
        around = {os.path.realpath(place), *map(str, Path(os.path.realpath(place)).parents)}
        inner[:] = [name for name in inner if os.path.realpath(os.path.join(place, name)) not in around]
        yield place, files


def _read_split(
    folder: Path, names: tuple[str, ...], empty: Sequence[str], size: int, workers: int | None, value_range: float
) -> tuple[Images, Tensor]:
    unknown = [name for name in _classes(folder) if name not in names]
    unknown = [name for name in unknown if name not in empty or _find(folder, [name]).files]
    if unknown:
        wanted = "expected only classes with images in train/"
        raise DataError(f"{shown(folder / unknown[0])}: {wanted}, found class {shown(unknown[0])!r}")
    found = _find(folder, names)
    if not found.files:
        raise DataError(f"{shown(folder)}: expected image files ({', '.join(SUFFIXES)}), found none")
    if remarks := found.remarks():
        warnings.warn(f"{shown(folder)}: {'; '.join(remarks)}", stacklevel=4)
    files = [file for file, _ in found.files]
    _require_bright(files, value_range)
    images = FileImages(files, size, workers or 0, value_range)
    labels = torch.tensor([label for _, label in found.files])
    return images.decode() if workers is None else images, labels


def _require_bright(files: list[Path], value_range: float) -> None:
    """Images of 10 or 12 bits in files of 16 would be nearly black: their range has to be given."""
    if value_range:
        return
    chosen = files[:: max(1, len(files) // _SAMPLE)]
    found = [one for file in chosen if (one := brightest(file)) is not None]
    values = [value for value, _ in found]
    if values and 0 < max(values) <= 65535 / 16:
        if any(deep for _, deep in found):
            raise DataError(f"{shown(files[0].parent)}: found no value above {max(values):g}: {DEEP_COLOR}")
        bits = next(bits for bits in (8, 10, 12) if max(values) < 2**bits)
        raise DataError(
            f"{shown(files[0].parent)}: expected 16-bit images, found no value above {max(values):g}; "
            f"if they have {bits} bits, set --image-range {2**bits - 1}"
        )
