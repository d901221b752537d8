"""From an image file to the top classes: `python -m gatedconv_runtime`."""

from __future__ import annotations

import importlib
import struct
import zlib

import numpy as np
import pytest
import torch

from gatedconv.data.image_files import read_image
from tests.runtime.conftest import small_net
from tests.tolerances import assert_close

image_module = pytest.fixture(lambda rt: importlib.import_module("gatedconv_runtime.image"))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels, filters, color, *, depth=8, interlaced=0, palette=b""):
    """Encode uint8 (H, W, C) by the definition of PNG's filters, byte by byte."""
    height, width, channels = pixels.shape
    lines = pixels.reshape(height, -1).astype(int)
    raw = b""
    for y in range(height):
        kind = filters[y % len(filters)]
        coded = []
        for i in range(lines.shape[1]):
            a = lines[y, i - channels] if i >= channels else 0
            b = lines[y - 1, i] if y else 0
            c = lines[y - 1, i - channels] if y and i >= channels else 0
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            coded.append((lines[y, i] - (0, a, b, (a + b) // 2, paeth)[kind]) % 256)
        raw += bytes([kind, *coded])
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header)] + ([chunk(b"PLTE", palette)] if palette else [])
    data = zlib.compress(raw)
    parts += [chunk(b"IDAT", data[:9]), chunk(b"IDAT", data[9:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("color", "channels", "read"), [(0, 1, 1), (2, 3, 3), (4, 2, 1), (6, 4, 3)])
@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (4, 3, 2, 1, 0)])
def test_png_files_are_read(image_module, tmp_path, color, channels, read, filters):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, channels), np.uint8)
    (tmp_path / "a.png").write_bytes(png(pixels, filters, color))
    np.testing.assert_array_equal(image_module.read_image(tmp_path / "a.png"), pixels[:, :, :read])


def test_png_files_with_a_palette_are_read(image_module, tmp_path):
    index = np.random.default_rng(0).integers(0, 4, (3, 3, 1), np.uint8)
    colors = np.random.default_rng(1).integers(0, 256, (4, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(png(index, (0,), 3, palette=colors.tobytes()))
    np.testing.assert_array_equal(image_module.read_image(tmp_path / "a.png"), colors[index[:, :, 0]])
    (tmp_path / "a.png").write_bytes(png(index, (0,), 3, palette=colors[:2].tobytes()))
    with pytest.raises(ValueError, match="palette is cut short"):
        image_module.read_image(tmp_path / "a.png")


def test_damaged_images_are_refused(image_module, tmp_path):
    whole = png(np.zeros((4, 4, 3), np.uint8), (4,), 2)
    draw = np.random.default_rng(0)
    for i in range(200):
        content = bytearray(whole[: 8 + i % (len(whole) - 8)] if i % 2 else whole)
        if not i % 2:
            content[draw.integers(8, len(content))] ^= 1 << draw.integers(8)
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            image_module.read_image(tmp_path / "a.png")


def test_other_files_are_refused_or_left_to_pillow(image_module, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8), (0,), 2, interlaced=1))
    (tmp_path / "a.txt").write_text("no image")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "PIL", None)
        with pytest.raises(ValueError, match="the PNG is interlaced; with Pillow it could be read"):
            image_module.read_image(tmp_path / "a.png")
        with pytest.raises(ValueError, match="it is no PNG; with Pillow"):
            image_module.read_image(tmp_path / "a.txt")
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(image_module.read_image(tmp_path / "a.bmp"), pixels)
    with pytest.raises(ValueError, match="no image that Pillow reads"):
        image_module.read_image(tmp_path / "a.txt")


def test_images_become_inputs(image_module, rt, plan_bytes):
    net = rt.load(plan_bytes)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mean, std = torch.tensor(net.mean), torch.tensor(net.std)
    expected = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    assert_close(torch.from_numpy(image_module.prepare(pixels, net)), expected)
    resized = image_module.prepare(np.random.default_rng(0).integers(0, 256, (37, 9, 1), np.uint8), net)
    assert resized.shape == (1, 3, 16, 16) and resized.dtype == np.float32


@pytest.mark.parametrize("size", [(37, 9), (5, 40), (16, 16)])
def test_images_are_resized_as_torch_does(image_module, size):
    x = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = (image_module._bilinear(extent, 16, extent) for extent in size)
    expected = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    found = torch.from_numpy(rows.astype(float) @ x[0, 0].numpy() @ columns.astype(float).T)
    assert_close(found.float(), expected[0, 0].float())


@pytest.mark.parametrize("kind", ["gray of 16 bits", "float", "turned", "wide", "tall"])
def test_images_are_read_as_in_training(image_module, rt, plan_bytes, tmp_path, kind):
    image = pytest.importorskip("PIL.Image")
    net, file = rt.load(plan_bytes), tmp_path / "a.tif"
    generator = np.random.default_rng(0)
    if kind == "gray of 16 bits":
        image.fromarray(generator.integers(0, 65536, (16, 16), np.uint16)).save(file)
    elif kind == "float":
        image.fromarray(generator.random((16, 16), np.float32)).save(file)
    else:
        height, width = {"turned": (16, 24), "wide": (20, 41), "tall": (50, 16)}[kind]
        pixels = image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
        exif = pixels.getexif()
        exif[0x0112] = 6 if kind == "turned" else 1  # the orientation
        file = tmp_path / "a.jpg"
        pixels.save(file, exif=exif)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (net.mean, net.std))
    wanted = read_image(file, 16).float() / 255
    found = torch.from_numpy(image_module.prepare(image_module.read_image(file), net))[0] * std + mean
    # Pillow rounds to a level of 255 behind each direction of a resize.
    assert float((found - wanted).abs().max()) <= 2 / 255


def test_the_command_prints_the_top_classes(rt, plan_bytes, tmp_path, capsys):
    main = importlib.import_module("gatedconv_runtime.__main__").main
    (tmp_path / "net.plan").write_bytes(plan_bytes)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(png(pixels, (1,), 2))
    assert main([str(tmp_path / "net.plan"), str(tmp_path / "a.png"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    net = rt.load(plan_bytes)
    x = ((torch.from_numpy(pixels) / 255 - torch.tensor(net.mean)) / torch.tensor(net.std)).permute(2, 0, 1)[None]
    scores = small_net()(x).softmax(1)[0]
    order = scores.argsort(descending=True)[:2]
    assert lines == [f"{100 * scores[i]:6.2f} %  {net.classes[i]}" for i in order]
    assert main([str(tmp_path / "net.plan")]) == 0 and "M MACs" in capsys.readouterr().out
    assert main([str(tmp_path / "gone.plan"), str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.startswith("gatedconv_runtime: ")
