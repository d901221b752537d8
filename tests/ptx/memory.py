"""Global and shared memory of a simulated GPU, with bounds, alignment and happens-before checks.

Every byte remembers the warp that wrote it last and that warp's epoch, the number of barriers that its block had passed
by then. An access by another warp of the block is ordered behind it where the block has passed a barrier since; by a
block of the same cluster, where the cluster has; by any other block, never: within a launch nothing orders blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.ptx.machine import Block, Warp

LANES = np.arange(32)
ALL = np.ones(32, bool)
ALL.flags.writeable = False
NONE = np.zeros(32, bool)
NONE.flags.writeable = False
NOBODY, MANY = -1, -2
GUARD = 4096  # bytes that belong to nobody between two buffers


class Fault(Exception):
    """What a GPU would stop at, or would hang in."""


class GlobalMemory:
    """Buffers of one launch or several; the space between them is out of bounds."""

    BASE = 1 << 33

    def __init__(self, size: int = 1 << 16) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.valid = np.zeros(size, bool)
        self.end = GUARD

    def place(self, array: np.ndarray, room: int = 0) -> int:
        """Copy an array to a buffer of its own and return the buffer's address."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at = self.end
        self.end = (at + max(raw.size, room, 1) + GUARD + 255) // 256 * 256
        while self.end + GUARD > self.bytes.size:
            self.bytes = np.concatenate([self.bytes, np.zeros_like(self.bytes)])
            self.valid = np.concatenate([self.valid, np.zeros_like(self.valid)])
        self.bytes[at : at + raw.size] = raw
        self.valid[at : at + raw.size] = True
        return self.BASE + at

    def read_back(self, address: int, like: np.ndarray) -> np.ndarray:
        """Return what a buffer holds, as an array like the one that was placed."""
        at = address - self.BASE
        return self.bytes[at : at + like.nbytes].copy().view(like.dtype).reshape(like.shape)

    def begin_launch(self) -> None:
        """Forget who wrote what: a launch is ordered behind the one before it."""
        self.writer = np.full(self.bytes.size, NOBODY, np.int32)
        self.epoch = np.full(self.bytes.size, -1, np.int32)

    def index(self, warp: Warp, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """Byte positions (lanes, size) of an access, which must be aligned and inside of buffers."""
        check_aligned(warp, addresses, size, what)
        index = (addresses - self.BASE)[:, None] + np.arange(size)
        if index.min() < 0 or index.max() >= self.bytes.size or not self.valid[index].all():
            raise Fault(f"{what} out of bounds: {warp.where()}")
        return index

    def read(self, warp: Warp, addresses: np.ndarray, size: int, atomic: bool = False) -> np.ndarray:
        """Return the bytes (lanes, size)."""
        index = self.index(warp, addresses, size, "global read")
        if not atomic:
            self._check(warp, index, "global read of what another warp wrote")
        return self.bytes[index]

    def write(self, warp: Warp, addresses: np.ndarray, data: np.ndarray, atomic: bool = False) -> None:
        """Write data (lanes, size)."""
        index = self.index(warp, addresses, data.shape[1], "global write")
        if not atomic:
            changed = self.bytes[index] != data
            self._check(warp, index, "global write over what another warp wrote", changed)
            self.writer[index], self.epoch[index] = warp.number, warp.block.epoch
            check_lanes(warp, index, data)
        self.bytes[index] = data

    def _check(self, warp: Warp, index: np.ndarray, what: str, where: np.ndarray | None = None) -> None:
        writer = self.writer[index]
        others = (writer != warp.number) & (writer != NOBODY)
        if where is not None:
            others &= where
        if others.any():
            same_block = writer // 64 == warp.number // 64
            unordered = others & (~same_block | (self.epoch[index] == warp.block.epoch))
            if unordered.any():
                warp.note(f"race: {what}, with nothing in between that orders them")


class SharedMemory:
    """Shared memory of one block: bytes, who wrote and who read each last, and copies under way."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xCD, np.uint8)
        self.written = np.zeros(size, bool)
        self.writer = np.full(size, NOBODY, np.int32)
        self.epoch = np.full(size, -1, np.int32)
        self.cluster_epoch = np.full(size, -1, np.int32)
        self.reader = np.full(size, NOBODY, np.int32)
        self.read_epoch = np.full(size, -1, np.int32)
        self.copying = np.zeros(size, np.int16)

    def index(self, warp: Warp, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """Byte positions (lanes, size) of an access, which must be aligned and in bounds."""
        check_aligned(warp, addresses, size, what)
        index = addresses[:, None] + np.arange(size)
        if index.min() < 0 or index.max() >= self.bytes.size:
            raise Fault(f"{what} out of bounds, {index.max()} of {self.bytes.size} bytes: {warp.where()}")
        return index

    def read(self, warp: Warp, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the bytes (lanes, size) that a warp of this block reads."""
        index = self.index(warp, addresses, size, "shared read")
        if self.copying[index].any():
            warp.note("race: read of bytes that a cp.async is still copying")
        if not self.written[index].all():
            warp.note("read of shared memory that nobody wrote")
        if self._unordered_write(warp, warp.block, index).any():
            warp.note("race: shared read of what another warp wrote, without a barrier")
        epoch = warp.block.epoch
        shared_by = (self.read_epoch[index] == epoch) & (self.reader[index] != warp.number)
        self.reader[index] = np.where(shared_by, MANY, warp.number)
        self.read_epoch[index] = epoch
        return self.bytes[index]

    def write(self, warp: Warp, block: Block, addresses: np.ndarray, data: np.ndarray) -> None:
        """Write data (lanes, size) for a warp of this block or of another of its cluster."""
        index = self.index(warp, addresses, data.shape[1], "shared write")
        if self.copying[index].any():
            warp.note("race: write to bytes that a cp.async is still copying")
        self._check_overwrite(warp, block, index, self.bytes[index] != data)
        check_lanes(warp, index, data)
        self.bytes[index] = data
        self.mark(warp, block, index)

    def begin_copy(self, warp: Warp, addresses: np.ndarray, size: int) -> np.ndarray:
        """Begin a cp.async into this memory: until it lands, the bytes are garbage."""
        index = self.index(warp, addresses, size, "cp.async")
        self._check_overwrite(warp, warp.block, index, np.ones(index.shape, bool))
        self.copying[index] += 1
        self.bytes[index] = 0xEE
        return index

    def land(self, warp: Warp, index: np.ndarray, data: np.ndarray) -> None:
        """End a cp.async."""
        self.copying[index] -= 1
        self.bytes[index] = data
        self.mark(warp, warp.block, index)

    def mark(self, warp: Warp, block: Block, index: np.ndarray) -> None:
        """Remember who wrote, and when."""
        self.writer[index], self.written[index] = warp.number, True
        self.epoch[index] = block.epoch if warp.block is block else -1
        self.cluster_epoch[index] = warp.block.cluster_epoch

    def _unordered_write(self, warp: Warp, block: Block, index: np.ndarray) -> np.ndarray:
        """Where the last write is another warp's and no barrier of both came since."""
        writer = self.writer[index]
        others = (writer != warp.number) & (writer != NOBODY)
        if not others.any():
            return others
        same_block = writer // 64 == warp.number // 64
        since = np.where(
            same_block, self.epoch[index] == block.epoch, self.cluster_epoch[index] == warp.block.cluster_epoch
        )
        return others & since

    def _check_overwrite(self, warp: Warp, block: Block, index: np.ndarray, changed: np.ndarray) -> None:
        # Copies of one value, which compilers let several warps store, are no conflict.
        if (self._unordered_write(warp, block, index) & changed).any():
            warp.note("race: two warps write to shared memory without a barrier")
        reader = self.reader[index]
        since = self.read_epoch[index] == block.epoch
        if warp.block is not block:
            since = self.read_epoch[index] >= block.cluster_began
        if ((reader != warp.number) & (reader != NOBODY) & since & changed).any():
            warp.note("race: write over shared memory that another warp read, without a barrier")


def check_aligned(warp: Warp, addresses: np.ndarray, size: int, what: str) -> None:
    """Every address must be a multiple of the access's size."""
    if (addresses % size).any():
        raise Fault(f"misaligned {what} of {size} bytes: {warp.where()}")


def check_lanes(warp: Warp, index: np.ndarray, data: np.ndarray) -> None:
    """Lanes of one instruction that write to one address must agree: which one is kept is undefined."""
    first = index[:, 0]
    _, kept, back = np.unique(first, return_index=True, return_inverse=True)
    if len(kept) < len(first) and (data != data[kept][back]).any():
        warp.note("race: lanes of one store write different values to one address")
