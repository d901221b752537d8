"""Batches made where the model is: uint8 images live on the device and are augmented there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.data.image_data import Augment, ImageData
from gatedconv.data.image_files import FileImages


class Normalize:
    """uint8 (N, C, H, W) -> float (N, C, H, W) normalized by the train split's mean and std per channel."""

    def __init__(self, data: ImageData, device: torch.device, memory_format: torch.memory_format) -> None:
        self.scale = (1 / (255 * torch.tensor(data.std, device=device))).view(1, -1, 1, 1)
        self.shift = (-torch.tensor(data.mean, device=device) / torch.tensor(data.std, device=device)).view(1, -1, 1, 1)
        self.memory_format = memory_format

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 images in the memory format of the constructor."""
        pixels = images.to(dtype=torch.float32, memory_format=self.memory_format)
        return torch.addcmul(self.shift, pixels, self.scale)


class TrainBatches:
    """One pass over the train split per iteration: shuffled, cropped, flipped, normalized, all on the device.

    The last, incomplete batch of a pass is left out; another shuffle brings its images back. Every random
    choice comes from `generator`, except for the first coins of alternating flips, which `seed` alone decides; `state`
    has what a checkpoint needs to resume exactly.

    With several processes each gets its share of every batch: all of them draw the same numbers, for the full batch.

    Args:
        data: the images.
        batch_size: images per batch, of all processes together; at most the size of the train split.
        augment: pad and flip; None for that of `data`.
        device: where images live and batches are made.
        seed: seed of the generator.
        memory_format: of the batches.
        rank: number of this process.
        world: number of processes.

    Raises:
        ValueError: if the train split is smaller than one batch, or a process would get less than 2 images.
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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 2 * world:
            raise ValueError(
                f"batch_size: expected at least {2 * world}, 2 images for each of {world} processes, got {batch_size}"
            )
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
        self.share = share(batch_size, rank, world)
        self.position = 0
        self.passes = 0
        self._begun = self.generator.get_state()
        self._skip_to = 0
        coins = torch.Generator(device).manual_seed((seed + 1) % 2**63)
        self._mirrored_first = torch.randint(0, 2, (len(self.labels),), generator=coins, device=device)
        self.images = data.train_images
        if not isinstance(self.images, FileImages):
            self._crops = self._all_crops(self.images)

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float (B, C, H, W), labels int64 (B,)); `position` batches of the pass have been yielded."""
        first, self._skip_to = self._skip_to, 0
        if first:
            now = self.generator.get_state()
            self.generator.set_state(self._begun)
        self._begun = self.generator.get_state()
        order = self._random(len(self.labels), shuffle=True)
        if first:
            self.generator.set_state(now)
        parity = self.passes % 2
        batches = order[: len(self) * self.batch_size].split(self.batch_size)[first:]
        taken = [chosen[self.share] for chosen in batches]
        pixels = self.images.batches(taken) if isinstance(self.images, FileImages) else None
        for number, chosen in enumerate(taken, start=first + 1):
            if pixels is None:
                images = self._augmented(self._crops, chosen)
            else:
                images = self._augmented(self._all_crops(next(pixels)), torch.arange(len(chosen)))
            if self.augment.flip:
                images = torch.where(self._mirrored(chosen, parity).view(-1, 1, 1, 1), images.flip(3), images)
            images = self.normalize(images)
            self.position = number % len(self)
            self.passes += not self.position
            yield images, self.labels[chosen]

    def state(self) -> dict[str, Tensor | int]:
        """The position of the batches, within a pass or between two."""
        return {
            "data": self.generator.get_state(),
            "begun": self._begun,
            "position": self.position,
            "passes": self.passes,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`: the next pass is the rest of an interrupted one, if there was one.

        The state of another kind of device's generator seeds this one: an interrupted pass then continues in another
        order, and may repeat an image.
        """
        self._begun = state["begun"]
        self.position = self._skip_to = int(state["position"])
        self.passes = int(state["passes"])
        if state["data"].numel() != self.generator.get_state().numel():
            digest = hashlib.sha256(state["data"].numpy().tobytes()).digest()
            self.generator.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
            self._begun = self.generator.get_state()
            self._random(len(self.labels), shuffle=True)  # of the pass; what follows are other numbers
        else:
            self.generator.set_state(state["data"])

    def _all_crops(self, images: Tensor) -> Tensor:
        """A view (N, C, 2 pad + 1, 2 pad + 1, H, W) of every crop of every image: picking crops is one gather."""
        pad = self.augment.pad
        mode = "reflect" if self.augment.mirrored and pad else "constant"
        padded = F.pad(images.to(self.labels.device, non_blocking=True), (pad, pad, pad, pad), mode)
        return padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)

    def _augmented(self, crops: Tensor, chosen: Tensor) -> Tensor:
        """A random crop of each chosen image; only these crops are read."""
        places = 2 * self.augment.pad + 1
        top, left = (self._random(self.batch_size, below=places)[self.share] for _ in range(2))
        return crops[chosen.to(crops.device), :, top, left]

    def _mirrored(self, chosen: Tensor, parity: int) -> Tensor:
        """Bool (B,): which of the chosen images are mirrored in a pass of even (0) or odd (1) number."""
        if self.augment.alternating:
            return self._mirrored_first[chosen] != parity
        return self._random(self.batch_size, below=2)[self.share].bool()

    def _random(self, count: int, *, below: int = 0, shuffle: bool = False) -> Tensor:
        device = self.labels.device
        if shuffle:
            return torch.randperm(count, generator=self.generator, device=device)
        return torch.randint(below, (count,), generator=self.generator, device=device)


class EvalBatches:
    """Normalized batches of all images in order, for evaluation and for the vote at the freeze.

    Args:
        data: the images.
        split: "train" or "test".
        batch_size: images per batch; the last one may be smaller.
        device: where batches are made; uint8 images in memory are moved there once.
        memory_format: of the batches.
        rank: number of this process, which gets its share of the images, possibly none.
        world: number of processes.
    """

    def __init__(
        self,
        data: ImageData,
        split: str = "test",
        *,
        batch_size: int = 500,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        images, labels = (
            (data.train_images, data.train_labels) if split == "train" else (data.test_images, data.test_labels)
        )
        self.device = torch.device(device)
        mine = share(len(labels), rank, world)
        self._all = images
        self.labels = labels[mine].to(self.device)
        if isinstance(images, FileImages):
            self.images: Tensor | FileImages = images[torch.arange(len(labels))[mine]]
        else:
            self.images = images[mine].to(self.device)
        self.batch_size = batch_size
        self.normalize = Normalize(data, self.device, memory_format)

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float (B, C, H, W), labels int64 (B,))."""
        if len(self.labels):  # `split` makes one empty batch of nothing
            for images, labels in zip(self._pixels(), self.labels.split(self.batch_size), strict=True):
                yield self.normalize(images), labels

    def first(self, count: int) -> Tensor:
        """The first images of the split, normalized, (count, C, H, W); repeated if there are too few."""
        rows = torch.arange(count) % len(self._all)
        images = self._all.decode(rows) if isinstance(self._all, FileImages) else self._all[rows]
        return self.normalize(images.to(self.device))

    def _pixels(self) -> Iterator[Tensor]:
        if not isinstance(self.images, FileImages):
            yield from self.images.split(self.batch_size)
            return
        for images in self.images.batches(list(torch.arange(len(self.images)).split(self.batch_size))):
            yield images.to(self.device, non_blocking=True)


def share(count: int, rank: int, world: int) -> slice:
    """The part of ``count`` items of a rank; the parts are in order and differ by one at most."""
    return slice(count * rank // world, count * (rank + 1) // world)
