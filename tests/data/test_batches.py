from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gatedconv.data import Augment, EvalBatches, ImageData, TrainBatches, load_data
from tests.image_files import blobs, write_npz
from tests.tolerances import assert_close


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    images, labels = blobs(40, channels=3)
    splits = {"train_images": images, "train_labels": labels, "test_images": images[:7], "test_labels": labels[:7]}
    return load_data(f"npz:{write_npz(tmp_path / 'a.npz', **splits)}")


def to_bytes(batch: torch.Tensor, data: ImageData) -> np.ndarray:
    """Undo the normalization, in float64."""
    mean, std = (np.array(values).reshape(1, -1, 1, 1) for values in (data.mean, data.std))
    return np.rint((batch.double().numpy() * std + mean) * 255).astype(np.uint8)


def test_without_augmentation_a_pass_is_a_shuffle_of_the_train_split(data: ImageData) -> None:
    batches = TrainBatches(data, 8, augment=Augment(), seed=1)
    seen = [(to_bytes(images, data), labels) for images, labels in batches]
    assert len(seen) == len(batches) == 5
    got = np.concatenate([images for images, _ in seen]).reshape(40, -1)
    want = data.train_images.numpy().reshape(40, -1)
    assert not np.array_equal(got, want)
    assert np.array_equal(np.unique(got, axis=0), np.unique(want, axis=0))
    by_content = {row.tobytes(): label for row, label in zip(want, data.train_labels.tolist(), strict=True)}
    labels = torch.cat([labels for _, labels in seen]).tolist()
    assert [by_content[row.tobytes()] for row in got] == labels


def test_every_augmented_image_is_a_crop_of_the_padded_one_and_half_are_mirrored(data: ImageData) -> None:
    batches = TrainBatches(data, 40, augment=Augment(pad=2, flip=True), seed=1)
    mirrored, places = 0, set()
    for _ in range(5):
        images, labels = next(iter(batches))
        for image in to_bytes(images, data):
            found = [
                (top, left, flip)
                for source in data.train_images.numpy()
                for padded in [np.pad(source, ((0, 0), (2, 2), (2, 2)))]
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if np.array_equal(padded[:, top : top + 8, left : left + 8][:, :, :: -1 if flip else 1], image)
            ]
            assert found
            places.add(found[0][:2])
            mirrored += found[0][2]
    assert len(places) == 25
    assert 70 < mirrored < 130  # of 200: 4 standard deviations


def test_the_generator_state_is_all_that_order_and_augmentation_depend_on(data: ImageData) -> None:
    first, second = TrainBatches(data, 8, seed=1), TrainBatches(data, 8, seed=2)
    list(first)
    second.generator.set_state(first.generator.get_state())
    for (a, labels_a), (b, labels_b) in zip(first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(labels_a, labels_b)


def test_an_incomplete_batch_is_left_out_of_training_but_not_of_evaluation(data: ImageData) -> None:
    assert sum(len(labels) for _, labels in TrainBatches(data, 16)) == 32
    evaluation = EvalBatches(data, "test", batch_size=4)
    assert [len(labels) for _, labels in evaluation] == [4, 3] and len(evaluation) == 2
    images = np.concatenate([to_bytes(images, data) for images, _ in evaluation])
    assert np.array_equal(images, data.test_images.numpy())


def test_memory_format_and_scale(data: ImageData) -> None:
    batches = EvalBatches(data, "train", batch_size=40, memory_format=torch.channels_last)
    images, _ = next(iter(batches))
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
    assert_close(images.mean((0, 2, 3)), torch.zeros(3), scale=1.0)
    assert_close(images.std((0, 2, 3), unbiased=False), torch.ones(3))


def test_bad_arguments(data: ImageData) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at most 40"):
        TrainBatches(data, 41)
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'val'"):
        EvalBatches(data, "val")


def test_alternating_flips_show_each_image_both_ways_in_two_epochs(data: ImageData) -> None:
    batches = TrainBatches(data, 8, augment=Augment(flip=True, alternating=True), seed=1)
    sources = data.train_images.numpy()
    seen: dict[int, list[bool]] = {}
    for epoch in range(4):
        if epoch == 2:  # an interrupted pass continues as it began
            first = TrainBatches(data, 8, augment=Augment(flip=True, alternating=True), seed=1)
            first.set_state(batches.state())
            batches = first
        for images, _ in batches:
            for image in to_bytes(images, data):
                number = next(
                    i
                    for i, source in enumerate(sources)
                    if image.tobytes() in (source.tobytes(), source[..., ::-1].tobytes())
                )
                seen.setdefault(number, []).append(image.tobytes() != sources[number].tobytes())
    assert all(flips in ([True, False] * 2, [False, True] * 2) for flips in seen.values())
    assert 0.2 < np.mean([flips[0] for flips in seen.values()]) < 0.8


def test_a_mirrored_border_continues_the_image(data: ImageData) -> None:
    batches = TrainBatches(data, 40, augment=Augment(pad=2, mirrored=True), seed=1)
    padded = [np.pad(source, ((0, 0), (2, 2), (2, 2)), "reflect") for source in data.train_images.numpy()]
    side = data.image_shape[1]
    crops = {p[:, t : t + side, s : s + side].tobytes() for p in padded for t in range(5) for s in range(5)}
    images, _ = next(iter(batches))
    assert all(image.tobytes() in crops for image in to_bytes(images, data))


def test_every_process_has_the_first_images_even_one_without_a_share(data: ImageData) -> None:
    whole = EvalBatches(data).first(3)
    assert_close(whole, next(iter(EvalBatches(data)))[0][:3])
    for rank in range(9):  # of seven images
        assert torch.equal(EvalBatches(data, rank=rank, world=9).first(3), whole)
