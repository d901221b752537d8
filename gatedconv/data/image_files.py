"""Image files that are decoded on demand: folders that do not fit into memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

DEEP_COLOR = "of 16-bit colors Pillow reads the upper 8 bits alone; scale the values to the full range, or store 8 bits"
_WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Pillow's modes of more than 8 bits


class DataError(ValueError):
    """A data source that is missing, damaged or not of the expected form; the message is for the user."""


class FileImages:
    """A sequence of images in files, each RGB uint8 (3, size, size); replaces a tensor (N, 3, size, size).

    Args:
        files: their paths.
        size: height and width to which they are scaled, in pixels.
        workers: processes that decode batches ahead of their use; 0 decodes on demand.
        value_range: of images with more than 8 bits, see `read_image`.
    """

    def __init__(self, files: Sequence[Path], size: int, workers: int = 0, value_range: float = 0.0) -> None:
        self.files, self.size, self.workers, self.value_range = list(files), size, workers, value_range

    @property
    def shape(self) -> torch.Size:
        """(N, 3, size, size)."""
        return torch.Size((len(self.files), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Tensor) -> FileImages:
        """The images of int64 rows (K,), still in their files."""
        return FileImages([self.files[row] for row in rows.tolist()], self.size, self.workers, self.value_range)

    def decode(self, rows: Tensor | None = None) -> Tensor:
        """The images of int64 rows (K,), or all, as uint8 (K, 3, size, size).

        Raises:
            DataError: names a file that cannot be read.
        """
        chosen = range(len(self.files)) if rows is None else rows.tolist()
        images = torch.empty(len(chosen), 3, self.size, self.size, dtype=torch.uint8)
        for place, row in enumerate(chosen):
            images[place] = read_image(self.files[row], self.size, self.value_range)
        return images

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """One uint8 batch (K, 3, size, size) for every int64 (K,) of rows, decoded by the workers.

        Raises:
            DataError: names a file that cannot be read.
        """
        loader = DataLoader(
            _Decoder(self.files, self.size, self.value_range),
            batch_sampler=[chosen.tolist() for chosen in rows],
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_stacked,
            worker_init_fn=_ignore_foreign_sigterm,
            generator=torch.Generator(),  # the loader draws a seed: not from the global generator
        )
        with _sigterm_blocked():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Decoder(Dataset[Tensor | DataError]):
    def __init__(self, files: list[Path], size: int, value_range: float) -> None:
        self.files, self.size, self.value_range = files, size, value_range

    def __getitem__(self, row: int) -> Tensor | DataError:
        try:
            return read_image(self.files[row], self.size, self.value_range)
        except DataError as error:  # raised in a worker, it would lose its type on the way
            return error


def _ignore_foreign_sigterm(worker: int) -> None:
    """In a worker: ignore SIGTERM, unless the parent sends it; a SIGTERM to all processes is handled by the parent."""
    if not hasattr(signal, "sigwaitinfo"):  # the system does not report the sender of a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM while workers start; it is delivered afterwards."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stacked(images: list[Tensor | DataError]) -> Tensor | DataError:
    good = []
    for image in images:
        if isinstance(image, DataError):
            return image
        good.append(image)
    return torch.stack(good)


def read_image(file: Path, size: int, value_range: float = 0.0) -> Tensor:
    """An image as RGB uint8 (3, size, size): upright, shorter side scaled to `size`, center cropped.

    Args:
        file: an image of any kind that Pillow reads.
        size: height and width of the result in pixels.
        value_range: the brightest value of images with more than 8 bits, which becomes 255. 0: 65535 for whole
            numbers, 1 for floating-point ones.

    Raises:
        DataError: names the file, if it cannot be read, or has values beyond that range.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if value_range not in (0.0, 65535.0) and has_deep_color(opened):
                raise DataError(f"{shown(file)}: --image-range {value_range:g} does not apply to it: {DEEP_COLOR}")
            image = ImageOps.exif_transpose(opened)
            if image.mode in _WIDE:
                image = Image.fromarray(_narrowed(file, np.asarray(image, dtype=np.float64), image.mode, value_range))
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{shown(file)}: expected a readable image, found a damaged or different file ({shown(str(error))})"
        ) from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def has_deep_color(image: Any) -> bool:
    """Whether an opened image of Pillow has colors of 16 bits, of which Pillow keeps the upper 8."""
    return any(";16" in str(part[-1]) for part in getattr(image, "tile", ())) and image.mode not in _WIDE


def brightest(file: Path) -> tuple[float, bool] | None:
    """The largest value in an image of whole numbers with more than 8 bits; None for others and unreadable files.

    And whether it has colors, of which the upper 8 bits count.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            deep = has_deep_color(image)
            if not deep and (image.mode not in _WIDE or image.mode == "F"):
                return None
            largest = float(np.asarray(image.convert("RGB") if deep else image, dtype=np.float64).max())
            return (largest * 256 + 255 if deep else largest), deep
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _narrowed(file: Path, values: np.ndarray[Any, Any], mode: str, value_range: float) -> np.ndarray[Any, Any]:
    top = value_range or (1.0 if mode == "F" else 65535.0)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):
        kind = "floating-point" if mode == "F" else "16-bit"
        raise DataError(
            f"{shown(file)}: expected {kind} values from 0 to {top:g}, found {low:g} to {high:g}; "
            f"set --image-range to the largest value of your images"
        )
    scaled: np.ndarray[Any, Any] = (values * (255 / top)).round().astype(np.uint8)
    return scaled


def shown(path: Path | str) -> str:
    """A file name that can be printed, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
