from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gatedconv.data import DataError, load_data, validation_view
from tests.image_files import blobs, write_npz


def test_digits_are_scikit_learns_scans_in_bytes() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits")
    scans = load_digits()
    assert data.train_images.dtype == torch.uint8 and data.image_shape == (1, 8, 8)
    assert len(data.train_labels) + len(data.test_labels) == len(scans.target) == 1797
    everything = torch.cat([data.train_images, data.test_images]).flatten(1).sort(0).values
    original = torch.from_numpy(np.round(scans.data * 255 / 16)).to(torch.uint8).sort(0).values
    assert torch.equal(everything, original)


def test_digits_split_is_stratified_and_moves_with_the_seed_alone() -> None:
    first, again, other = (load_data("digits", seed=3), load_data("digits", seed=3), load_data("digits", seed=4))
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.test_images, other.test_images)
    share = first.test_labels.bincount() / torch.cat([first.train_labels, first.test_labels]).bincount()
    assert float((share - 0.25).abs().max()) < 0.01


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("column", [False, True])
def test_npz_forms_of_medmnist(tmp_path: Path, channels: int, column: bool) -> None:
    images, labels = blobs(12, channels=channels)
    path = write_npz(
        tmp_path / "a.npz",
        train_images=images,
        train_labels=labels[:, None].astype(np.uint8) if column else labels,
        test_images=images[:6],
        test_labels=labels[:6],
        class_names=np.array(["a", "b", "c"]),
    )
    data = load_data(f"npz:{path}")
    planes = images[..., None] if channels == 0 else images
    assert np.array_equal(data.train_images.numpy(), planes.transpose(0, 3, 1, 2))
    assert data.train_labels.tolist() == labels.tolist() and data.train_labels.dtype == torch.int64
    assert data.class_names == ("a", "b", "c") and data.num_classes == 3
    scaled = planes.astype(np.float64) / 255
    assert data.mean == pytest.approx(scaled.mean(axis=(0, 1, 2)))
    assert data.std == pytest.approx(scaled.std(axis=(0, 1, 2)))
    assert data.augment.flip is (channels == 3)


def _npz_faults() -> list[Any]:
    images, labels = blobs(48)
    out_of_range = labels.copy()
    out_of_range[5] = 7
    negative = labels.astype(np.int64) - 1
    return [
        pytest.param({"test_labels": None}, "missing key test_labels", id="missing key"),
        pytest.param({"train_images": images / 255}, "train_images: expected dtype uint8", id="dtype"),
        pytest.param({"train_images": images[0]}, r"train_images: expected shape \(N, H, W\)", id="rank"),
        pytest.param(
            {"test_images": np.zeros((24, 9, 9), np.uint8)},
            "test_images: expected images of 8x8 pixels .* found 9x9",
            id="image size",
        ),
        pytest.param(
            {"train_images": np.zeros((48, 3, 8, 8), np.uint8)}, "expected channels last", id="channels first"
        ),
        pytest.param({"test_labels": out_of_range[:24]}, "test_labels: expected labels 0 to 2, found 7", id="label"),
        pytest.param({"train_labels": negative}, "train_labels: expected labels .* found -1", id="negative"),
        pytest.param({"train_labels": labels[:-1]}, "train_labels: expected 48 labels", id="count"),
        pytest.param({"train_labels": labels / 2}, "train_labels: expected whole numbers", id="float labels"),
        pytest.param({"train_labels": np.zeros((48, 2), int)}, r"expected shape \(N,\)", id="label shape"),
        pytest.param({"train_labels": np.zeros(48, int)}, "expected at least 2 classes, found 1", id="one class"),
        pytest.param({"train_labels": np.full(48, -1)}, "train_labels: .* 0 to 47 .* found -1", id="all negative"),
        pytest.param(
            {"train_labels": np.where(np.arange(48) == 0, 2**40, labels)},
            r"train_labels: expected labels 0 to 47 .*class_names.*, found 1099511627776",
            id="wild label",
        ),
        pytest.param(
            {"train_labels": np.full(48, 2**64 - 1, np.uint64)},
            r"train_labels: expected labels below 2\*\*63, found 18446744073709551615",
            id="unsigned",
        ),
        pytest.param({"class_names": np.array("a")}, r"class_names: expected shape \(classes,\)", id="names 0-d"),
        pytest.param({"class_names": np.array(["a"])}, "class_names: expected at least 2", id="one name"),
        pytest.param(
            {"class_names": np.array(["a", "b"])},
            "train_labels: expected labels 0 to 1, as class_names has 2 names, found 2",
            id="two names",
        ),
        pytest.param({"val_images": images[:6]}, "missing key val_labels; .*val_images", id="val images alone"),
        pytest.param({"val_labels": labels[:6]}, "missing key val_images", id="val labels alone"),
        pytest.param({"test_images": images[:0], "test_labels": labels[:0]}, "at least one image", id="empty"),
        pytest.param({"train_images": images.astype(object)}, "train_images: .*damaged", id="pickled"),
    ]


@pytest.mark.parametrize(("changes", "message"), _npz_faults())
def test_npz_faults_name_file_key_expected_and_found(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_npz(tmp_path / "fault.npz", **changes)
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"npz:{path}")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_npz_missing_damaged_or_other_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an .npz file, found nothing there"):
        load_data(f"npz:{tmp_path / 'none.npz'}")
    with pytest.raises(DataError, match="found a folder"):
        load_data(f"npz:{tmp_path}")
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    for name, content in {
        "text.npz": b"hello",
        "empty.npz": b"",
        "cut.npz": whole[: len(whole) // 2],
        "flipped.npz": whole[:1000] + bytes([whole[1000] ^ 255]) + whole[1001:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_data(f"npz:{tmp_path / name}")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"found a single \.npy array"):
        load_data(f"npz:{tmp_path / 'single.npy'}")


def _write_folder(root: Path, split: str, per_class: int = 2, size: tuple[int, int] = (12, 10)) -> None:
    for label, name in enumerate(("cat", "dog")):
        (root / split / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new("RGB", size, (100 * label, 50, 0)).save(root / split / name / f"{index}.png")


@pytest.mark.parametrize("second", ["test", "val"])
def test_imagefolder_reads_classes_by_name(tmp_path: Path, second: str) -> None:
    _write_folder(tmp_path, "train", 3)
    _write_folder(tmp_path, second)
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert data.class_names == ("cat", "dog") and data.image_shape == (3, 8, 8)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.train_images[0, :, 4, 4].tolist() == [0, 50, 0]
    assert data.train_images[3, :, 4, 4].tolist() == [100, 50, 0]


def test_imagefolder_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder train/"):
        load_data(f"imagefolder:{tmp_path}")
    _write_folder(tmp_path, "train")
    with pytest.raises(DataError, match="test/ or val/"):
        load_data(f"imagefolder:{tmp_path}")
    _write_folder(tmp_path, "test")
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(DataError, match="found class 'emu'"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "test" / "emu").rmdir()
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1\.png: expected a readable image"):
        load_data(f"imagefolder:{tmp_path}")


def test_imagefolder_without_pillow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_folder(tmp_path, "train")
    _write_folder(tmp_path, "test")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs Pillow: pip install pillow"):
        load_data(f"imagefolder:{tmp_path}")


def test_unknown_sources_and_unreadable_cifar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown source 'mnist'; expected digits, cifar10"):
        load_data("mnist")
    with pytest.raises(DataError, match="expected npz:PATH"):
        load_data("npz:")


def test_cifar_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data = np.full((4, 32, 32, 3), (1, 2, 3), np.uint8)
            self.targets = [0, 1, 2, 9]
            self.classes = [str(number) for number in range(10)]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    with pytest.warns(UserWarning, match=r"cifar10: t.*_labels: 6 of 10 classes have no image, the first is '3'"):
        data = load_data("cifar10", root=tmp_path)
    assert data.image_shape == (3, 32, 32) and data.train_images[0, :, 0, 0].tolist() == [1, 2, 3]
    assert (data.augment.pad, data.augment.flip, data.num_classes) == (4, True, 10)

    def failing(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("File not found\nor corrupted.")

    monkeypatch.setattr(datasets, "CIFAR10", failing)
    with pytest.raises(DataError, match=r"cifar10: could not be downloaded or read \(File not found or corr"):
        load_data("cifar10", root=tmp_path)


def test_validation_view_holds_out_a_stratified_part_of_train() -> None:
    data = load_data("digits")
    view = validation_view(data, 0.1, seed=0)
    assert len(view.train_labels) + len(view.test_labels) == len(data.train_labels)
    assert set(view.test_labels.tolist()) == set(range(10))
    assert view.mean == pytest.approx([view.train_images.double().mean().item() / 255])


def test_a_small_validation_share_still_holds_every_class(tmp_path: Path) -> None:
    data = load_data(f"npz:{write_npz(tmp_path / 'a.npz')}")
    view = validation_view(data, 0.01, seed=0)
    assert sorted(view.test_labels.tolist()) == [0, 1, 2] and len(view.train_labels) == 45


def test_a_train_split_that_can_spare_nothing_is_refused(tmp_path: Path) -> None:
    images, labels = blobs(3)
    path = write_npz(tmp_path / "a.npz", train_images=images, train_labels=labels)
    with pytest.raises(DataError, match="val_fraction: .* found 3 images of 3 classes"):
        validation_view(load_data(f"npz:{path}"), 0.1, seed=0)


def test_validation_view_prefers_the_sources_own_split(tmp_path: Path) -> None:
    images, labels = blobs(9, seed=5)
    path = write_npz(tmp_path / "v.npz", val_images=images, val_labels=labels)
    view = validation_view(load_data(f"npz:{path}"), 0.1, seed=0)
    assert view.test_images[:, 0].numpy().tolist() == images.tolist() and len(view.train_labels) == 48
