"""A data set that arrives in parts, such as a few sheets at a time: ``python -m benchmarks.gpu.data``.

Environment: ``DATA``, a folder with what has arrived: a data set's files, or folders of them by the set's name.
``STORE``, where parts are collected (default ``~/.cache/gatedconv/data``). A set NAME is complete when every image that
its labels tell of is there; then ``STORE/NAME.npz`` is written, which `make gpu-experiments` finds by itself.

Files of a set: ``train-00.webp``, ``train-01.webp``, ..., ``test-00.webp``, ..., lossless sheets of 50 x 50 images of
32 x 32 pixels, row by row; ``train-labels.npy``, ``test-labels.npy``, in the same order; ``classes.txt``, a line each.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.__main__ import fail

SIDE, PIXELS = 50, 32
PER_SHEET = SIDE * SIDE
LABELS = ("train-labels.npy", "test-labels.npy")
CLASSES = "classes.txt"
# Mean of each channel over the original train split, 0 to 1, as published: a sheet of another set would move it.
TRAIN_MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}


def store_folder(environment: Mapping[str, str]) -> Path:
    """Where parts are collected, outside of the checkout."""
    return Path(environment.get("STORE") or Path.home() / ".cache" / "gatedconv" / "data").absolute()


def collect(arrived: Path, store: Path) -> list[str]:
    """Copy what has arrived to the store, and write the archives of sets that are complete; a line for each set.

    Raises:
        ValueError: no files of a set there, or a file that is damaged.
        OSError: the store cannot be written.
    """
    if not arrived.is_dir():
        raise ValueError(f"DATA: expected a folder of parts, found none at {arrived}")
    folders = [arrived] if _files(arrived) else sorted(path for path in arrived.iterdir() if _files(path))
    if not folders:
        raise ValueError(f"{arrived}: expected sheets such as train-00.webp, {LABELS[0]} or {CLASSES}, found none")
    lines = []
    for folder in folders:
        name = folder.absolute().name
        collected = store / name
        collected.mkdir(parents=True, exist_ok=True)
        for file in _files(folder):
            partial = collected / f".{file.name}.partial"
            shutil.copyfile(file, partial)
            os.replace(partial, collected / file.name)
        missing = missing_files(collected)
        if missing:
            shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
            lines.append(f"{name}: still missing {shown}")
        else:
            lines.append(unpack(collected, store / f"{name}.npz"))
    return lines


def _files(folder: Path) -> list[Path]:
    names = [*folder.glob("train-[0-9][0-9].webp"), *folder.glob("test-[0-9][0-9].webp")]
    return sorted(path for path in [*names, *(folder / name for name in (*LABELS, CLASSES))] if path.is_file())


def missing_files(folder: Path) -> list[str]:
    """What a set lacks; labels tell how many sheets there are."""
    missing = [name for name in (*LABELS, CLASSES) if not (folder / name).is_file()]
    for name in LABELS:
        if name not in missing:
            split = name.partition("-")[0]
            sheets = -(-len(_labels(folder / name)) // PER_SHEET)
            names = [f"{split}-{i:02d}.webp" for i in range(sheets)]
            missing += [each for each in names if not (folder / each).is_file()]
    return missing


def unpack(folder: Path, archive: Path) -> str:
    """Write a complete set as one .npz of uint8 images (N, 32, 32, 3) and labels (N,); returns a line that says so.

    Raises:
        ValueError: a sheet is damaged, or of another form, or the images are not those of a set that is known.
    """
    import numpy as np

    names = [line.strip() for line in (folder / CLASSES).read_text(encoding="utf-8").splitlines() if line.strip()]
    arrays: dict[str, Any] = {"class_names": np.array(names)}
    for split in ("train", "test"):
        labels = _labels(folder / f"{split}-labels.npy")
        sheets = [_sheet(folder / f"{split}-{i:02d}.webp") for i in range(-(-len(labels) // PER_SHEET))]
        arrays[f"{split}_images"] = np.concatenate(sheets)[: len(labels)]
        arrays[f"{split}_labels"] = labels
    mean = arrays["train_images"].mean(axis=(0, 1, 2), dtype=np.float64) / 255
    expected = TRAIN_MEAN.get(folder.name)
    if expected is not None and not np.allclose(mean, expected, atol=1e-4, rtol=0):
        raise ValueError(f"{folder}: expected images of mean {expected}, found {tuple(mean.round(4))}: other sheets")
    partial = archive.with_name(f".{archive.name}")
    np.savez(partial.with_suffix(".partial.npz"), **arrays)
    os.replace(partial.with_suffix(".partial.npz"), archive)
    counts = f"{len(arrays['train_labels'])} train and {len(arrays['test_labels'])} test images"
    return f"{folder.name}: complete, {counts} in {archive}"


def _labels(path: Path) -> Any:
    import numpy as np

    try:
        labels = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected labels as .npy, could not read it ({error})") from None
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(f"{path}: expected whole numbers (N,), found {labels.dtype} {labels.shape}")
    return labels


def _sheet(path: Path) -> Any:
    """The images of a sheet, uint8 (2500, 32, 32, 3)."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: expected a sheet of images, could not read it ({error})") from None
    edge = SIDE * PIXELS
    if pixels.shape != (edge, edge, 3):
        raise ValueError(f"{path}: expected {edge} x {edge} pixels, found {pixels.shape[1]} x {pixels.shape[0]}")
    return pixels.reshape(SIDE, PIXELS, SIDE, PIXELS, 3).swapaxes(1, 2).reshape(-1, PIXELS, PIXELS, 3)


def found_sources(store: Path) -> dict[str, str]:
    """Every set that is complete, as `gatedconv report run --source` has it: {"cifar10": "npz:PATH"}."""
    return {path.stem: f"npz:{path}" for path in sorted(store.glob("[!.]*.npz"))}


def main(environment: Mapping[str, str]) -> int:
    """Collect what DATA names; 0 also while something is missing, 2 with one line for an error."""
    data = environment.get("DATA")
    if not data:
        return fail("data: expected DATA, a folder of parts")
    try:
        print("\n".join(collect(Path(data), store_folder(environment))))
    except (ValueError, OSError, ImportError) as error:
        return fail(f"data: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
