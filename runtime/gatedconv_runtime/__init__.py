"""Runs a network that ``gatedconv export --format plan`` has written, with NumPy and without PyTorch.

>>> import gatedconv_runtime as rt
>>> net = rt.load("net.plan")
>>> y = net(x)  # x: float32 (N, C, H, W)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any

import numpy as np

from gatedconv_runtime._library import load_library

__version__ = "0.1.0"
__all__ = ["Plan", "PlanError", "file_version", "isa", "load", "release"]

_lib = load_library()
_Four = ctypes.c_int64 * 4


class PlanError(ValueError):
    """A file is no plan or is damaged, an input does not fit the network, or memory is short."""


class Plan:
    """A network, ready to run. `load` makes one.

    A plan does not change: several threads may call it at the same time, and a forked process may continue to use it.

    Attributes:
        input_size: (N, C, H, W) that the plan was made for. C is fixed; other batches do, and other heights and widths
            where the network takes them.
        threads: What a call runs on by default; 0 for as many as there are cores.
    """

    input_size: tuple[int, int, int, int]
    threads: int

    def __init__(self, handle: int, threads: int) -> None:
        self._handle = handle
        self._close = _lib.gatedconv_plan_close
        self._sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.threads = threads
        size = _Four()
        _lib.gatedconv_plan_input_size(handle, size)
        self.input_size = (size[0], size[1], size[2], size[3])

    def __del__(self) -> None:
        self._close(self._handle)

    def __reduce__(self) -> Any:
        raise TypeError("a plan cannot be pickled; load its file in the other process")

    def __repr__(self) -> str:
        return f"Plan(input_size={self.input_size}, output_size={self.output_size(self.input_size)})"

    def __call__(self, x: np.ndarray, *, threads: int | None = None) -> np.ndarray:
        """Run the network.

        Args:
            x: float32 (N, C, H, W), any strides.
            threads: At most so many, instead of the plan's own.

        Returns:
            float32 (N, C') or (N, C', H', W'), a new array.

        Raises:
            TypeError: `x` is no array of float32.
            PlanError: `x` has a shape that the network does not take, or memory is short.
        """
        if not isinstance(x, np.ndarray) or x.dtype != np.float32:
            raise TypeError(f"the input must be a NumPy array of float32, got {_kind(x)}")
        size = self.output_size(x.shape)
        try:
            if not x.flags.aligned or any(stride % 4 for stride in x.strides):
                x = x.copy()
            y = np.empty(size, np.float32)
        except MemoryError:
            raise PlanError("no memory") from None
        stride = _Four(*(stride // 4 for stride in x.strides))
        count = _threads(threads) if threads is not None else self.threads
        failed = _lib.gatedconv_plan_run(
            self._handle, x.ctypes.data, _Four(*x.shape), stride, y.ctypes.data, y.size, count
        )
        if failed:
            raise _error()
        return y

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output's shape for an input of shape (N, C, H, W).

        Raises:
            PlanError: The network takes no such input.
        """
        found = self._sizes.get(input_size)
        if found is None:
            output = _Four()
            rank = _lib.gatedconv_plan_output_size(self._handle, _size(input_size), output)
            if rank < 0:
                raise _error()
            found = tuple(output)[:rank]
            if len(self._sizes) >= 64:
                self._sizes.clear()
            self._sizes[tuple(input_size)] = found
        return found

    def workspace(self, input_size: tuple[int, ...] | None = None) -> int:
        """Return the bytes that a call takes in addition to its arrays, for an input of shape (N, C, H, W)."""
        found: int = _lib.gatedconv_plan_workspace(self._handle, _size(input_size or self.input_size), self.threads)
        if found < 0:
            raise _error()
        return found

    def describe(self, input_size: tuple[int, ...] | None = None) -> str:
        """Report what runs for an input of shape (N, C, H, W): layers, kernels, MACs, memory."""
        size, room = _size(input_size or self.input_size), 1 << 12
        while True:
            text = ctypes.create_string_buffer(room)
            length = _lib.gatedconv_plan_describe(self._handle, size, self.threads, text, room)
            if length < 0:
                raise _error()
            if length < room:
                return text.value.decode()
            room = length + 1

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the outputs, None where the file has none."""
        text = self._text("classes")
        names = None if text is None else tuple(text.split("\n"))
        if names is not None and len(names) != self.output_size(self.input_size)[1]:
            raise PlanError(f"the file's classes are damaged: {len(names)} names")
        return names

    @property
    def mean(self) -> tuple[float, ...] | None:
        """For each channel, of pixels from 0 to 1: the network's input is (pixel - mean) / std."""
        return self._numbers("mean")

    @property
    def std(self) -> tuple[float, ...] | None:
        """See `mean`."""
        return self._numbers("std")

    @property
    def producer(self) -> str:
        """Name and version of the program that wrote the file."""
        return self._text("producer") or "unknown"

    def _text(self, key: str) -> str | None:
        text: bytes | None = _lib.gatedconv_plan_metadata(self._handle, key.encode())
        return None if text is None else text.decode(errors="replace")

    def _numbers(self, key: str) -> tuple[float, ...] | None:
        text = self._text(key)
        if text is None:
            return None
        with contextlib.suppress(ValueError):
            numbers = tuple(map(float, text.split()))
            if len(numbers) == self.input_size[1]:
                return numbers
        raise PlanError(f"the file's {key} is damaged: {text[:80]!r}")


def load(source: str | os.PathLike[str] | bytes, *, threads: int = 0) -> Plan:
    """Read a plan.

    Args:
        source: The path of a file, or the bytes of one.
        threads: What calls run on; 0 for as many as there are cores.

    Raises:
        PlanError: The file cannot be read, or it is no plan, damaged, or newer than this package.
        TypeError: `source` is something else.
    """
    count = _threads(threads)
    if isinstance(source, bytes):
        handle = _lib.gatedconv_plan_open_memory(source, len(source))
    elif isinstance(source, (str, os.PathLike)):
        path = os.fsencode(source)
        if b"\0" in path:
            raise PlanError(f"{os.fsdecode(path)!r} is no path")
        handle = _lib.gatedconv_plan_open(path)
    else:
        raise TypeError(f"load: expected a path or bytes, got {type(source).__name__}")
    if not handle:
        raise _error()
    return Plan(handle, count)


def file_version() -> int:
    """Return the version of the files that `load` reads; it refuses a newer one."""
    version: int = _lib.gatedconv_plan_file_version()
    return version


def isa() -> str:
    """Return the instruction set in use: "portable", "avx2" or "avx512"; GATEDCONV_ISA limits it.

    Raises:
        PlanError: GATEDCONV_ISA names another one, or one that this machine has not.
    """
    name: bytes | None = _lib.gatedconv_plan_isa()
    if name is None:
        raise _error()
    return name.decode()


def release() -> int:
    """Free the memory that finished calls have left for the next ones; returns its bytes."""
    freed: int = _lib.gatedconv_plan_release()
    return freed


def _error() -> PlanError:
    return PlanError(_lib.gatedconv_plan_error().decode(errors="replace"))


def _threads(threads: int) -> int:
    if not isinstance(threads, int) or isinstance(threads, bool):
        raise TypeError(f"threads must be an int, got {type(threads).__name__}")
    if not 0 <= threads < 1 << 31:
        raise ValueError(f"threads must be at least 0, got {threads}")
    return threads


def _size(size: tuple[int, ...]) -> Any:
    if len(size) != 4:
        raise PlanError(f"the input must have the shape (N, C, H, W), got {tuple(size)}")
    if not all(0 <= extent < 1 << 62 for extent in size):
        raise PlanError(f"the input is too large: {tuple(size)}")
    return _Four(*size)


def _kind(x: object) -> str:
    return f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
