"""The form in which every data source returns its images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gatedconv.data.image_files import DataError, FileImages

Images = Tensor | FileImages
"""uint8 (N, C, H, W), in memory or in files."""

# Statistics of images in files are those of a sample: decoding all of them takes as long as an epoch.
_SAMPLE = 4096


@dataclass(frozen=True)
class Augment:
    """Random changes made to each training image.

    Attributes:
        pad: pixels of border added on every side before a random crop of the original size.
        flip: mirror every other image left to right, at random.
        mirrored: the border is the image mirrored at its edge, not black.
        alternating: chance decides in the first epoch alone; each image is then mirrored in every other epoch.
    """

    pad: int = 0
    flip: bool = False
    mirrored: bool = False
    alternating: bool = False


@dataclass(frozen=True)
class ImageData:
    """Labeled images, in memory or in files, split in train and test.

    Attributes:
        train_images: uint8 (N, C, H, W), 0..255.
        train_labels: int64 (N,), values in [0, num_classes).
        test_images: uint8 (M, C, H, W).
        test_labels: int64 (M,).
        num_classes: number of classes.
        class_names: one name per class.
        mean: per-channel mean of the train split, of pixels scaled to [0, 1].
        std: per-channel standard deviation of the same.
        augment: the augmentation that suits these images.
        val_images: uint8 (V, C, H, W) where the source brings a validation split of its own, else None.
        val_labels: int64 (V,) or None.
    """

    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    val_images: Images | None = None
    val_labels: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width


def make_image_data(
    where: str,
    train: tuple[Images, Tensor],
    test: tuple[Images, Tensor],
    augment: Augment,
    class_names: tuple[str, ...] = (),
    val: tuple[Images, Tensor] | None = None,
) -> ImageData:
    """Check the splits against each other, work out classes, mean and std, and build an `ImageData`.

    Args:
        where: the source, named in errors.
        train: images uint8 (N, C, H, W) and labels int64 (N,).
        test: the same for the test split.
        augment: augmentation of the train split.
        class_names: names in label order; without them classes are called "0", "1", ...
        val: optional validation split.

    Warns:
        UserWarning: where a class has no image in a split.

    Raises:
        DataError: a split is empty, sizes differ, or a label is out of range.
    """
    splits = {"train": train, "test": test} | ({"val": val} if val is not None else {})
    for name, (images, labels) in splits.items():
        if len(images) == 0:
            raise DataError(f"{where}: {name}_images: expected at least one image, found none")
        if len(images) != len(labels):
            raise DataError(
                f"{where}: {name}_labels: expected {len(images)} labels, one per image, found {len(labels)}"
            )
        if images.shape[1:] != train[0].shape[1:]:
            raise DataError(
                f"{where}: {name}_images: expected images of {_size(train[0])} as in train_images, "
                f"found {_size(images)}"
            )
    num_classes = _class_count(where, train[1], class_names)
    source = f", as class_names has {num_classes} names" if class_names else ""
    for name, (_, labels) in splits.items():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            found = low if low < 0 else high
            raise DataError(f"{where}: {name}_labels: expected labels 0 to {num_classes - 1}{source}, found {found}")
        empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
        if empty:
            first = class_names[empty[0]] if class_names else str(empty[0])
            more = f"{len(empty)} of {num_classes} classes have no image, the first is {first!r}"
            warnings.warn(f"{where}: {name}_labels: {more}", stacklevel=4)
    mean, std = channel_statistics(train[0])
    return ImageData(
        *train,
        *test,
        num_classes=num_classes,
        class_names=class_names or tuple(str(label) for label in range(num_classes)),
        mean=mean,
        std=std,
        augment=augment,
        val_images=None if val is None else val[0],
        val_labels=None if val is None else val[1],
    )


def _class_count(where: str, labels: Tensor, class_names: tuple[str, ...]) -> int:
    """Number of names, else largest label + 1; at most one class per image, to catch a wild label."""
    if class_names:
        if len(class_names) < 2:
            raise DataError(f"{where}: class_names: expected at least 2 classes, found {len(class_names)}")
        return len(class_names)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(labels):
        raise DataError(
            f"{where}: train_labels: expected labels 0 to {len(labels) - 1} (as many classes as images, "
            f"where class_names does not name them), found {low if low < 0 else high}"
        )
    if high == 0:
        raise DataError(f"{where}: train_labels: expected at least 2 classes, found 1")
    return high + 1


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), in units of 255.

    Exact: counted from the 256-bin histogram of each channel. A constant channel gets std 1, so that
    normalizing it is harmless. For images in files 4096 of them, evenly spaced, are counted.
    """
    if isinstance(images, FileImages):
        images = images.decode(torch.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).round().long())
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        center = float((share * values).sum())
        spread = float((share * (values - center) ** 2).sum()) ** 0.5
        mean.append(center)
        std.append(spread if spread > 0 else 1.0)
    return tuple(mean), tuple(std)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices so that each class gives the same share to the second part.

    A class of at least two gives one or more, however small the share; the only one of a class stays in the
    first part.

    Args:
        labels: int64 (N,).
        fraction: share of each class in the second part, in (0, 1).
        seed: seed of the draw.

    Returns:
        Two sorted int64 index tensors, disjoint, together 0..N-1.
    """
    generator = torch.Generator().manual_seed(seed)
    second = []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        order = torch.randperm(len(members), generator=generator)
        count = max(round(fraction * len(members)), 1 if len(members) > 1 else 0)
        second.append(members[order[:count]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(second)] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()


def validation_view(data: ImageData, fraction: float, seed: int) -> ImageData:
    """The same data with the validation split in the place of the test split, for making choices.

    The source's own validation split if it has one, else a stratified `fraction` of the train split,
    which then no longer trains. The statistics are worked out again from what trains.

    Raises:
        DataError: no class of the train split can spare an image.
    """
    if data.val_images is not None and data.val_labels is not None:
        return replace(data, test_images=data.val_images, test_labels=data.val_labels)
    keep, held_out = stratified_split(data.train_labels, fraction, seed)
    if len(held_out) == 0:
        raise DataError(
            f"val_fraction: expected a train split with two images of a class at least, to hold out "
            f"{fraction:g} of it; found {len(keep)} images of {data.num_classes} classes"
        )
    images = data.train_images[keep]
    mean, std = channel_statistics(images)
    return replace(
        data,
        train_images=images,
        train_labels=data.train_labels[keep],
        test_images=data.train_images[held_out],
        test_labels=data.train_labels[held_out],
        mean=mean,
        std=std,
    )


def _size(images: Images) -> str:
    channels, height, width = images.shape[1:]
    return f"{height}x{width} pixels with {channels} channel(s)"
