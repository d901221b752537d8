"""Batches made where the model is: uint8 images live on the device and are augmented there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from gatedconv.data.image_data import Augment, ImageData


class Normalize:
    """uint8 (N, C, H, W) -> float (N, C, H, W) with the train split's mean and std taken out per channel."""

    def __init__(self, data: ImageData, device: torch.device, memory_format: torch.memory_format) -> None:
        self.scale = (1 / (255 * torch.tensor(data.std, device=device))).view(1, -1, 1, 1)
        self.shift = (-torch.tensor(data.mean, device=device) / torch.tensor(data.std, device=device)).view(1, -1, 1, 1)
        self.memory_format = memory_format

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 images in the memory format asked for."""
        pixels = images.to(dtype=torch.float32, memory_format=self.memory_format)
        return torch.addcmul(self.shift, pixels, self.scale)


class TrainBatches:
    """One pass over the train split per iteration: shuffled, cropped, flipped, normalised, all on the device.

    The last, incomplete batch of a pass is left out; another shuffle brings its images back. Every random
    choice comes from `generator`, whose state is all that a checkpoint needs to go on exactly.

    Args:
        data: the images.
        batch_size: images per batch, at most the size of the train split.
        augment: pad and flip; None for the one that `data` brings.
        device: where images live and batches are made.
        seed: seed of the generator.
        memory_format: of the batches.

    Raises:
        ValueError: if the train split is smaller than one batch.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if batch_size > len(data.train_images):
            raise ValueError(
                f"batch_size: expected at most {len(data.train_images)}, the size of the train split, got {batch_size}"
            )
        device = torch.device(device)
        self.augment = data.augment if augment is None else augment
        self.batch_size = batch_size
        self.labels = data.train_labels.to(device)
        self.normalize = Normalize(data, device, memory_format)
        self.generator = torch.Generator(device).manual_seed(seed)
        pad = self.augment.pad
        padded = functional.pad(data.train_images.to(device), (pad, pad, pad, pad))
        # A view (N, C, 2 pad + 1, 2 pad + 1, H, W) of every crop of every image: picking crops is one gather.
        height, width = data.image_shape[1:]
        self._crops = padded.unfold(2, height, 1).unfold(3, width, 1)

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float (B, C, H, W), labels int64 (B,))."""
        order = self._random(len(self.labels), shuffle=True)
        for chosen in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self.normalize(self._augmented(chosen)), self.labels[chosen]

    def _augmented(self, chosen: Tensor) -> Tensor:
        places = 2 * self.augment.pad + 1
        top, left = (self._random(len(chosen), below=places) for _ in range(2))
        images = self._crops[chosen, :, top, left]
        if self.augment.flip:
            flipped = self._random(len(chosen), below=2).bool().view(-1, 1, 1, 1)
            images = torch.where(flipped, images.flip(3), images)
        return images

    def _random(self, count: int, *, below: int = 0, shuffle: bool = False) -> Tensor:
        device = self.labels.device
        if shuffle:
            return torch.randperm(count, generator=self.generator, device=device)
        return torch.randint(below, (count,), generator=self.generator, device=device)


class EvalBatches:
    """Normalised batches in order, nothing left out, for evaluation and for the vote at the freeze.

    Args:
        data: the images.
        split: "train" or "test".
        batch_size: images per batch; the last one may be smaller.
        device: where batches are made; the uint8 images are moved there once.
        memory_format: of the batches.
    """

    def __init__(
        self,
        data: ImageData,
        split: str = "test",
        *,
        batch_size: int = 500,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        images, labels = (
            (data.train_images, data.train_labels) if split == "train" else (data.test_images, data.test_labels)
        )
        device = torch.device(device)
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size = batch_size
        self.normalize = Normalize(data, device, memory_format)

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float (B, C, H, W), labels int64 (B,))."""
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalize(images), labels
