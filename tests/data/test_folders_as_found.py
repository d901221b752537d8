"""Folders of images as people have them: what is read, in which order, and what is reported of the rest."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gatedconv.data import load_data
from gatedconv.data.image_files import DataError, read_image, shown

RAMP = np.linspace(0, 1, 16)[None, :].repeat(16, 0)


def make(root: Path, suffix: str = ".png", classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = generator.integers(0, 255, (12, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}{suffix}")
    return root


def load(root: Path, **options):
    return load_data(f"imagefolder:{root}", image_size=8, **options)


def test_hidden_files_and_folders_are_skipped_without_a_word(tmp_path):
    root = make(tmp_path)
    for split in ("train", "test"):
        (root / split / ".ipynb_checkpoints").mkdir()
        (root / split / "cat" / "._0.png").write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(root)
    assert data.class_names == ("cat", "dog") and len(data.train_images) == 4


def test_the_order_is_that_of_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    root = make(tmp_path, classes=("10", "9", "a é"))
    (root / "train" / "9" / "z" / "y").mkdir(parents=True)
    (root / "train" / "9" / "a").mkdir()
    for place in ("z/y", "a"):
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "train" / "9" / place / "0.png")
    wanted = datasets.ImageFolder(str(root / "train"))
    with pytest.warns(UserWarning, match="sub-folders count for their class: 9"):
        data = load(root, workers=0)
    assert list(map(str, data.train_images.files)) == [path for path, _ in wanted.samples]
    assert data.train_labels.tolist() == wanted.targets and list(data.class_names) == wanted.classes


def test_empty_classes_and_other_files_are_named(tmp_path):
    root = make(tmp_path)
    (root / "train" / "bird").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("x")
    with pytest.warns(UserWarning) as seen:
        data = load(root)
    text = " ".join(str(w.message) for w in seen)
    assert "without images are left out: bird" in text and "notes.txt" in text and data.num_classes == 2


@pytest.mark.parametrize("suffix", [".pgm", ".jfif"])
def test_suffixes(tmp_path, suffix):
    root = make(tmp_path, ".png")
    for file in root.rglob("*.png"):
        Image.open(file).save(file.with_suffix(suffix), format="JPEG" if suffix == ".jfif" else None)
        file.unlink()
    assert len(load(root).train_images) == 4


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("a.png", (RAMP * 65535).astype(np.uint16)),
        ("a.tif", RAMP.astype(np.float32)),
        ("b.tif", (RAMP * 65535).astype(np.int32)),
    ],
)
def test_more_than_8_bits_keep_their_range(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    got = read_image(tmp_path / name, 16)[0, 8].double()
    assert torch.allclose(got, torch.from_numpy(RAMP[0] * 255), atol=1)


def test_twelve_bits_in_sixteen_require_a_range(tmp_path):
    root = make(tmp_path)
    for file in root.rglob("*.png"):
        Image.fromarray((RAMP * 4095).astype(np.uint16)).save(file)
    with pytest.raises(DataError, match="--image-range 4095"):
        load(root)
    assert int(load(root, image_range=4095).train_images.max()) > 200


def test_values_out_of_range_are_refused(tmp_path):
    Image.fromarray((RAMP * 7).astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="from 0 to 1, found 0 to 7; set --image-range"):
        read_image(tmp_path / "a.tif", 16)
    assert int(read_image(tmp_path / "a.tif", 16, 7).max()) == 255


def test_orientation_is_applied(tmp_path):
    image = Image.fromarray((RAMP * 255).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    got = read_image(tmp_path / "a.png", 16)[0]
    assert got[0].float().std() < 1 and got[-1].float().mean() > 200


def test_names_that_are_no_utf8_can_be_printed():
    name = b"\xff\xfe.png".decode("utf-8", "surrogateescape")
    assert shown(name).encode() and "\\xff" in shown(name)


def test_labels_from_1_are_refused(tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    arrays = {
        f"{s}_{k}": v for s in ("train", "test") for k, v in (("images", images), ("labels", np.array([1, 2, 1, 2])))
    }
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match="subtract 1"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def write_deep_color(file: Path, values: np.ndarray) -> None:
    """A PNG of 16-bit colors, (H, W, 3), by the rules of its specification."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("bits", [12, 16])
def test_colors_of_twelve_bits_in_sixteen_are_refused(tmp_path, bits):
    root = make(tmp_path)
    for file in root.rglob("*.png"):
        write_deep_color(file, np.random.default_rng(0).integers(0, 2**bits, (12, 12, 3)))
    if bits == 16:
        assert load(root).train_images.max() > 200
    for options in ({}, {"image_range": 4095.0})[bits == 16 :]:
        with pytest.raises(DataError, match="of 16-bit colors Pillow reads the upper 8 bits"):
            load(root, **options)


def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path):
    root = make(tmp_path)
    expected = load(root).train_images
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat", target_is_directory=True)
    (root / "train" / "dog" / "up").symlink_to(root, target_is_directory=True)
    assert torch.equal(load(root).train_images, expected)


def test_dark_images_of_sixteen_bits_among_others_require_a_range(tmp_path):
    root = make(tmp_path)
    for file in sorted(root.rglob("0.png")):
        Image.fromarray(np.random.default_rng(0).integers(0, 4096, (12, 12), np.uint16)).save(file)
    with pytest.raises(DataError, match="--image-range 4095"):
        load(root)
