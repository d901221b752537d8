"""Image files as a network's input: a reader of PNG that needs nothing, Pillow for other formats where it is there."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np

from gatedconv_runtime import Plan

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type; 3 is an index into a palette
_MOST_PIXELS = 1 << 28


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file: PNG of 8 bits a sample, not interlaced; any other that Pillow reads, where it is installed.

    As the training reads folders: upright, and of samples with more than 8 bits the largest of their type becomes 255.

    Returns:
        uint8 (H, W, C), C 1 for gray or 3 for color; transparency is left out.

    Raises:
        ValueError: The file is no image, damaged, or of a format that is not read here.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read()
    reason = "it is no PNG"
    if content.startswith(_SIGNATURE):
        try:
            return _decode_png(content)
        except _Unsupported as error:
            reason = str(error)
        except (ValueError, struct.error, zlib.error) as error:
            raise ValueError(f"{os.fspath(path)}: the PNG is damaged ({error})") from None
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError(f"{os.fspath(path)}: {reason}; with Pillow it could be read: pip install pillow") from None
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            gray = image.mode in ("1", "L", "LA")
            if image.mode.startswith(("I", "F")):
                return _narrowed(np.asarray(image, np.float64), 1.0 if image.mode == "F" else 65535.0)
            pixels = np.asarray(image.convert("L" if gray else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: it is no image that Pillow reads ({error})") from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _narrowed(values: np.ndarray, largest: float) -> np.ndarray:
    """Values (H, W) from 0 to the largest as uint8 (H, W, 1)."""
    if not (values.min() >= 0 and values.max() <= largest):
        raise ValueError(f"expected values from 0 to {largest:g}, found {values.min():g} to {values.max():g}")
    narrow: np.ndarray = (values * (255 / largest)).round().astype(np.uint8)
    return narrow[:, :, None]


def prepare(image: np.ndarray, plan: Plan) -> np.ndarray:
    """Turn uint8 (H, W, C) into a plan's input (1, C, H, W): its channels, its size (bilinear), its normalization.

    As in training, what does not fit the plan's ratio of sides is cut off evenly at both ends.

    Raises:
        ValueError: The network takes neither gray nor color images.
    """
    _, channels, height, width = plan.input_size
    pixels = image.astype(np.float32) / 255
    if pixels.shape[2] != channels:
        if channels not in (1, 3):
            raise ValueError(f"the network takes images of {channels} channels, which image files have not")
        luma = np.array([0.299, 0.587, 0.114], np.float32)
        pixels = np.repeat(pixels, 3, 2) if channels == 3 else (pixels @ luma)[:, :, None]
    if pixels.shape[:2] != (height, width):
        tall, wide = pixels.shape[:2]
        rows = _bilinear(tall, height, min(tall, wide * height / width))
        columns = _bilinear(wide, width, min(wide, tall * width / height))
        pixels = np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)
    if plan.mean is not None:
        pixels = pixels - np.array(plan.mean, np.float32)
    if plan.std is not None:
        pixels = pixels / np.array(plan.std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)


def _bilinear(size: int, wanted: int, used: float) -> np.ndarray:
    """Weights (wanted, size) of a triangle as wide as a wanted pixel, and at least two pixels: as Pillow's.

    Of the middle ``used`` pixels.
    """
    scale = used / wanted
    reach = max(scale, 1.0)
    centers = (size - used) / 2 + (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centers[:, None]) / reach
    weights: np.ndarray = np.maximum(1 - distance, 0)
    weights /= weights.sum(1, keepdims=True)
    return weights.astype(np.float32)


class _Unsupported(ValueError):
    """A PNG that is in order, but of a kind that is not read here."""


def _decode_png(content: bytes) -> np.ndarray:
    header, palette, data = b"", b"", []
    at = len(_SIGNATURE)
    while True:
        size, kind = struct.unpack_from(">I4s", content, at)
        body = content[at + 8 : at + 8 + size]
        (checksum,) = struct.unpack_from(">I", content, at + 8 + size)
        if zlib.crc32(kind + body) != checksum:
            raise ValueError("a checksum is another")
        if kind == b"IHDR":
            header = body
        elif kind == b"PLTE":
            palette = body
        elif kind == b"IDAT":
            data.append(body)
        elif kind == b"IEND":
            break
        at += 12 + size
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if color not in _CHANNELS or not 0 < width * height <= _MOST_PIXELS:
        raise ValueError("its header is wrong")
    if depth != 8 or interlaced:
        raise _Unsupported("the PNG is interlaced" if interlaced else f"the PNG has {depth} bits a sample")
    channels = _CHANNELS[color]
    expected = height * (1 + width * channels)
    raw = zlib.decompressobj().decompress(b"".join(data), expected)
    if len(raw) != expected:
        raise ValueError("its pixels are cut short")
    pixels = _unfilter(np.frombuffer(raw, np.uint8).reshape(height, -1), channels).reshape(height, width, channels)
    if color == 3:
        colors = np.frombuffer(palette, np.uint8)
        if len(colors) % 3 or pixels.max() >= len(colors) // 3:
            raise ValueError("its palette is cut short")
        read: np.ndarray = colors.reshape(-1, 3)[pixels[:, :, 0]]
    else:
        read = pixels[:, :, : 1 if channels < 3 else 3]
    return read


def _unfilter(lines: np.ndarray, channels: int) -> np.ndarray:
    """Undo PNG's prediction: each line begins with the number of its predictor."""
    out = np.empty((len(lines), lines.shape[1] - 1), np.uint8)
    above = np.zeros(out.shape[1], np.uint8)
    for y, line in enumerate(lines):
        kind, values = line[0], line[1:]
        if kind == 0:
            above = values
        elif kind == 1:
            above = np.cumsum(values.reshape(-1, channels), 0, np.uint8).reshape(-1)
        elif kind == 2:
            above = values + above
        elif kind in (3, 4):
            above = _unfilter_line(values.tolist(), above.tolist(), channels, average=kind == 3)
        else:
            raise ValueError("a line's filter is unknown")
        out[y] = above
    return out


def _unfilter_line(values: list[int], above: list[int], channels: int, *, average: bool) -> np.ndarray:
    """Predict a byte by the mean of its left and upper neighbors, or by Paeth's choice of three."""
    for i, value in enumerate(values):
        left = values[i - channels] if i >= channels else 0
        upper = above[i]
        if average:
            guess = (left + upper) // 2
        else:
            corner = above[i - channels] if i >= channels else 0
            distances = abs(upper - corner), abs(left - corner), abs(left + upper - 2 * corner)
            guess = (left, upper, corner)[distances.index(min(distances))]
        values[i] = (value + guess) & 255
    return np.array(values, np.uint8)
