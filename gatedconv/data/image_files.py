"""Image files that are decoded on demand: folders that do not fit into memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gatedconv.data.errors import DataError


class FileImages:
    """A sequence of images in files, each RGB uint8 (3, size, size); replaces a tensor (N, 3, size, size).

    Args:
        files: their paths.
        size: height and width to which they are scaled, in pixels.
        workers: processes that decode batches ahead of their use; 0 decodes on demand.
    """

    def __init__(self, files: Sequence[Path], size: int, workers: int = 0) -> None:
        self.files, self.size, self.workers = list(files), size, workers

    @property
    def shape(self) -> torch.Size:
        """(N, 3, size, size)."""
        return torch.Size((len(self.files), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Tensor) -> FileImages:
        """The images of int64 rows (K,), still in their files."""
        return FileImages([self.files[row] for row in rows.tolist()], self.size, self.workers)

    def decode(self, rows: Tensor | None = None) -> Tensor:
        """The images of int64 rows (K,), or all, as uint8 (K, 3, size, size).

        Raises:
            DataError: names a file that cannot be read.
        """
        chosen = range(len(self.files)) if rows is None else rows.tolist()
        images = torch.empty(len(chosen), 3, self.size, self.size, dtype=torch.uint8)
        for place, row in enumerate(chosen):
            images[place] = read_image(self.files[row], self.size)
        return images

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """One uint8 batch (K, 3, size, size) for every int64 (K,) of rows, decoded by the workers.

        Raises:
            DataError: names a file that cannot be read.
        """
        loader = DataLoader(
            _Decoder(self.files, self.size),
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
    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, row: int) -> Tensor | DataError:
        try:
            return read_image(self.files[row], self.size)
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


def read_image(file: Path, size: int) -> Tensor:
    """An image as RGB uint8 (3, size, size): shorter side scaled to `size`, center cropped.

    Raises:
        DataError: names the file, if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: expected a readable image, found a damaged or different file ({error})") from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
