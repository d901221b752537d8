"""Fuzzes the package from Python: ``python runtime/fuzz/fuzz_python.py -max_total_time=600``, libFuzzer's options.

Needs ``pip install atheris ./runtime``. Plans of the corpus are changed here and there and opened; what opens is called
with arrays of odd types, shapes and strides; images are read. Anything but a result or one of the errors that the
package documents ends the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

try:
    import atheris
except ImportError:  # the tests make the same checks on random bytes
    atheris = None
with atheris.instrument_imports() if atheris else contextlib.nullcontext():
    import gatedconv_runtime as rt
    from gatedconv_runtime import image

CORPUS = [path.read_bytes() for path in sorted((Path(__file__).parent / "corpus").iterdir())]
TYPES = (*("f4",) * 16, ">f4", "f8", "f2", "i4", "u1", "?", "c8", "O", "S4", "M8[s]", "f4,f4")
EXTENTS = (0, 1, 2, 3, 5, 8, 16, 33)
MOST_BYTES = 1 << 24  # of maps and of the output: larger ones test nothing new, slowly
T = TypeVar("T")


class Draw:
    """Numbers and choices made by the fuzzer's bytes; zeros when there are no more."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def number(self, below: int) -> int:
        """An int from 0 to below - 1."""
        size = (below.bit_length() + 7) // 8
        taken, self.rest = self.rest[:size], self.rest[size:]
        return int.from_bytes(taken, "little") % below

    def choice(self, values: Sequence[T]) -> T:
        """One of some values."""
        return values[self.number(len(values))]


def check(data: bytes) -> bool:
    """Open, call or read what the bytes encode; returns whether a network returned an output."""
    draw = Draw(data)
    kind = draw.number(8)
    if kind == 0:
        with tempfile.NamedTemporaryFile(suffix=".png") as file, contextlib.suppress(ValueError):
            Path(file.name).write_bytes(png(draw))
            assert image.read_image(file.name).ndim == 3
        return False
    try:
        net = rt.load(draw.rest if kind == 1 else changed_plan(draw), threads=draw.number(3))
    except rt.PlanError as error:
        assert len(str(error).splitlines()) == 1, error
        return False
    with contextlib.suppress(rt.PlanError):
        _ = net.describe(), net.classes, net.producer, repr(net), net.mean, net.std
    return call(net, draw)


def changed_plan(draw: Draw) -> bytes:
    """A plan of the corpus with some numbers changed and the right checksum; perhaps cut, or followed by more."""
    content = bytearray(draw.choice(CORPUS))
    start = 8 + int.from_bytes(content[:8], "little")
    texts, numbers = content[8:start], (len(content) - start) // 8
    for _ in range(draw.choice((0, 0, 0, 1, 1, 2, 3))):
        if draw.number(8) == 0:
            texts[draw.number(len(texts))] = draw.number(256)
        else:
            at = start + 8 * draw.number(numbers)
            value = draw.choice((draw.number(40), draw.number(1 << 64), (1 << draw.number(64)), -1))
            content[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
    sealed = seal(bytes(texts), bytes(content[start:]))
    return draw.choice((sealed, sealed, sealed, sealed[: draw.number(len(sealed))], sealed + draw.rest))


def seal(header: bytes, data: bytes) -> bytes:
    """A file of a header and data with the right checksum, where the header is one."""
    try:
        parsed = json.loads(header)
        texts = {key: str(value) for key, value in parsed["__metadata__"].items() if key != "checksum"}
        said = b"".join(f"{key}\0{value}\0".encode() for key, value in sorted(texts.items()))
        parsed["__metadata__"]["checksum"] = f"crc32:{zlib.crc32(said + data):08x}"
        header = json.dumps(parsed).encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    return len(header).to_bytes(8, "little") + header + data


def png(draw: Draw) -> bytes:
    """A PNG of some header, whose checksums are right; perhaps cut."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">II", draw.choice(EXTENTS), draw.choice((1, 2, 3, draw.number(1 << 32))))
    header += bytes((draw.choice((8, 8, 8, 16)), draw.choice((0, 2, 3, 4, 6, 1)), 0, 0, draw.choice((0, 0, 0, 1))))
    palette = chunk(b"PLTE", bytes(draw.number(20)))
    pixels = draw.choice((draw.rest, zlib.compress(draw.rest * draw.number(200), 1)))
    parts = [chunk(b"IHDR", header), palette, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(parts[: draw.choice((4, 4, 4, 1, 2, 3))])
    return content[: len(content) - draw.choice((0, 0, 0, draw.number(9)))]


def odd_array(shape: Sequence[int], draw: Draw) -> Any:
    """An array of some type, shape and strides, or something else."""
    if draw.number(3) == 0:
        shape = [draw.choice((*shape, *EXTENTS)) for _ in range(draw.choice((4, 4, 4, 0, 1, 3, 5)))]
    elif len(shape) == 4 and draw.number(2):
        shape = [draw.choice((0, 1, 2, 3)), shape[1], draw.choice(EXTENTS), draw.choice(EXTENTS)]
    if math.prod(shape) > MOST_BYTES:
        return None
    x = np.zeros(shape, draw.choice(TYPES))
    if x.dtype.kind == "f":
        x += np.arange(x.size, dtype=np.float32).reshape(x.shape) % 7 - draw.choice((3, np.nan, np.inf))
    layout = draw.number(8)
    if layout == 0:
        return draw.choice((None, "x", [[1.0]], x.tolist(), memoryview(b"1234")))
    if layout == 1:
        return np.asfortranarray(x)
    if layout == 2:
        return x[tuple(slice(None, None, draw.choice((1, 2, -1, -2))) for _ in shape)]
    if layout == 3:
        return np.broadcast_to(x[:1, ...] if x.ndim else x, shape) if x.size else x
    if layout == 4 and x.dtype.itemsize == 4 and x.dtype.kind == "f":
        unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        unaligned[...] = x
        return unaligned
    if layout == 5:
        x.flags.writeable = False
    return x


def call(net: rt.Plan, draw: Draw) -> bool:
    """Call a network; returns whether it had an output, which depends neither on strides nor on threads."""
    x = odd_array(net.input_size if np.prod(net.input_size, dtype=float) < MOST_BYTES else (1, 1, 1, 1), draw)
    try:
        if isinstance(x, np.ndarray):
            floats = np.prod(net.output_size(x.shape), dtype=float)
            if max(net.workspace(x.shape), 4 * floats) > MOST_BYTES:
                return False
        y = net(x, threads=draw.choice((None, 0, 1, 2, 3)))
    except (rt.PlanError, TypeError):
        return False
    assert y.dtype == np.float32 and y.shape == net.output_size(x.shape)
    again = net(np.ascontiguousarray(x), threads=1)
    assert np.array_equal(y, again, equal_nan=True), "strides or threads change the answer"
    return True


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
