"""Runs a grid of a kernel: warps of 32 lanes in random order, several blocks or clusters at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tests.ptx.memory import ALL, LANES, NONE, Fault, GlobalMemory, SharedMemory
from tests.ptx.opcodes import Program, known, translate
from tests.ptx.parser import Kernel


class Warp:
    """32 lanes: a value per register and lane, and for every group of lanes the instruction that is next.

    Lanes that took different branches form groups; the group that is furthest behind runs, and groups that meet at an
    instruction join. Instructions that need all lanes of a warp (barriers, mma, ldmatrix, shfl) wait for the others.

    A register may be undefined in some lanes. What is computed from it is undefined, too, and compilers leave such
    values where nothing uses them; an address, a stored value or a condition that is undefined is a fault.

    Attributes:
        undefined: Register -> lanes in which it is undefined, where there are any.
        doubt: Lanes for which the instruction under way has read something undefined.
    """

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index = block, index
        self.number = block.number * 64 + index
        self.registers: list[np.ndarray | None] = [None] * len(block.machine.program.widths)
        self.undefined: dict[int, np.ndarray] = dict.fromkeys(range(len(self.registers)), ALL)
        self.doubt = NONE
        lanes = block.machine.threads - 32 * index
        self.live = ALL if lanes >= 32 else LANES < lanes
        self.groups: dict[int, np.ndarray] = {0: self.live}
        self.waiting: dict[int, np.ndarray] = {}
        self.state = "ready"
        self.open_copies: list[tuple] = []
        self.copy_groups: list[list[tuple]] = []
        self.count = 0
        self.pc = 0

    def where(self) -> str:
        """The instruction under way, for messages."""
        return f"{self.instruction} (block {self.block.id}, warp {self.index})"

    @property
    def instruction(self) -> str:
        """The text of the instruction under way."""
        return self.block.machine.program.kernel.instructions[self.pc].text

    def note(self, text: str) -> None:
        """Record a problem that does not end the run."""
        self.block.machine.notes[f"{text}: {self.instruction}"] += 1

    def require_defined(self, mask: np.ndarray) -> None:
        """Check that these lanes have read nothing undefined."""
        if (self.doubt & mask).any():
            raise Fault(f"something depends on a register that was never written: {self.where()}")

    # ---- memory

    def load(self, space: str, addresses: np.ndarray, size: int, mask: np.ndarray) -> np.ndarray:
        """Return the bytes (32, size) that the lanes of the mask read; zeros for the others."""
        self.require_defined(mask)
        used = addresses[mask]
        if space == "param":
            data = self.block.machine.parameters[used[:, None] + np.arange(size)]
        elif space == "shared":
            data = self.block.shared.read(self, used, size)
        else:
            data = self.block.machine.memory.read(self, used, size)
        if mask is ALL:
            return data
        out = np.zeros((32, size), np.uint8)
        out[mask] = data
        return out

    def store(self, space: str, addresses: np.ndarray, data: np.ndarray, mask: np.ndarray) -> None:
        """Write the bytes (32, size) of the lanes of the mask."""
        self.require_defined(mask)
        used, data = addresses[mask], data[mask]
        if space == "global":
            self.block.machine.memory.write(self, used, data)
        elif space == "shared":
            self.block.shared.write(self, self.block, used, data)
        else:  # an address of the cluster: rank + 1 above 24 bits of offset, as `mapa` makes it
            for rank in np.unique(used >> 24):
                to, lanes = self.block.cluster[int(rank) - 1], used >> 24 == rank
                if to.finished:
                    raise Fault(f"store in the shared memory of a block that has ended: {self.where()}")
                to.shared.write(self, to, used[lanes] & 0xFFFFFF, data[lanes])

    def copy_async(self, to: np.ndarray, source: np.ndarray, size: int, used: np.ndarray, mask: np.ndarray) -> None:
        """Begin a cp.async: the first `used` bytes of `size` are copied, the rest becomes zero."""
        self.require_defined(mask)
        memory = self.block.machine.memory
        index = self.block.shared.begin_copy(self, to[mask], size)
        data = np.zeros((len(index), size), np.uint8)
        reads = used[mask] > 0
        if reads.any():
            data[reads] = memory.read(self, source[mask][reads], size)
        self.open_copies.append((index, data))

    def commit_copies(self) -> None:
        """End a group of copies."""
        self.copy_groups.append(self.open_copies)
        self.open_copies = []

    def wait_copies(self, groups: int) -> None:
        """Let all groups land but the latest; copies land here, as late as they may."""
        while len(self.copy_groups) > groups:
            for index, data in self.copy_groups.pop(0):
                self.block.shared.land(self, index, data)

    # ---- execution

    def run(self, budget: int) -> None:
        """Execute up to that many instructions, or until a barrier or the end."""
        program, covered = self.block.machine.program, self.block.machine.covered
        while budget > 0 and self.state == "ready":
            if not self.groups:
                self._join()
                if not self.groups:
                    self.state = "done"
                    return
            pc = min(self.groups)
            mask = self.groups.pop(pc)
            others = min(self.groups, default=1 << 60)
            while True:
                kind, guard, act = program.code[pc]
                self.pc, self.doubt = pc, NONE
                covered[pc] = True
                budget -= 1
                self.count += 1
                if kind >= TOGETHER and not self._all_here(pc, mask):
                    break
                active = mask
                if guard is not None:
                    condition = known(self, guard[0])
                    self.require_defined(mask)
                    active = mask & (~condition if guard[1] else condition)
                    if active.all():
                        active = ALL
                if kind in (PLAIN, TOGETHER):
                    if guard is None or active.any():
                        act(self, active)
                    pc += 1
                elif kind == BRANCH:
                    if active.any():
                        self._to(act, active)
                        if (rest := mask & ~active).any():
                            self._to(pc + 1, rest)
                        break
                    pc += 1
                elif kind == EXIT:
                    self.live = self.live & ~active
                    if (rest := mask & ~active).any():
                        self._to(pc + 1, rest)
                    break
                else:
                    self._to(pc + 1, mask)
                    self.state = BARRIERS[kind]
                    return
                if pc >= others or budget <= 0:
                    self._to(pc, mask)
                    break

    def _to(self, pc: int, mask: np.ndarray) -> None:
        if pc in self.groups:
            mask = self.groups[pc] | mask
        self.groups[pc] = ALL if mask.all() else mask

    def _all_here(self, pc: int, mask: np.ndarray) -> bool:
        """Whether all lanes have come to this instruction; these wait there otherwise."""
        if mask is ALL or (mask == self.live).all():
            return True
        here = self.waiting.pop(pc, mask) | mask
        if (here == self.live).all():
            self.groups[pc] = here
        else:
            self.waiting[pc] = here
        return False

    def _join(self) -> None:
        """No lane can run: those that wait for others wait in vain, unless all that live wait at one place."""
        if len(self.waiting) > 1:
            raise Fault(f"lanes of one warp wait at different instructions: {self.where()}")
        for pc, mask in self.waiting.items():
            if not (mask == self.live).all():
                raise Fault(f"some lanes of a warp never come to an instruction of all: {self.where()}")
            self.groups[pc] = mask
        self.waiting = {}


PLAIN, BRANCH, EXIT, TOGETHER, BARRIER, CLUSTER_ARRIVE, CLUSTER_WAIT = range(7)
BARRIERS = {BARRIER: "barrier", CLUSTER_ARRIVE: "arrived", CLUSTER_WAIT: "cluster"}
KINDS = {
    "plain": PLAIN,
    "branch": BRANCH,
    "exit": EXIT,
    "together": TOGETHER,
    "barrier": BARRIER,
    "cluster arrive": CLUSTER_ARRIVE,
    "cluster wait": CLUSTER_WAIT,
}


class Block:
    """A block: its warps, its shared memory, and how many barriers it and its cluster have passed."""

    def __init__(self, machine: Machine, number: int, id: tuple[int, int, int]) -> None:
        self.machine, self.number, self.id = machine, number, id
        self.shared = SharedMemory(machine.shared_bytes)
        self.epoch = self.cluster_epoch = self.cluster_began = 0
        self.warps = [Warp(self, index) for index in range(-(-machine.threads // 32))]
        self.cluster: list[Block] = [self]

    @property
    def finished(self) -> bool:
        """Whether all its warps have ended."""
        return all(warp.state == "done" for warp in self.warps)


class Machine:
    """A simulated GPU.

    Args:
        memory: Global memory.
        seed: Of the order in which warps run.
        resident: Clusters that run at the same time.
        slice: Instructions that a warp runs at most before another one does.

    Attributes:
        notes: Problems found, with the instruction -> how often.
        instructions: Warp instructions executed.
        covered: For the kernel launched last, which instructions have run.
    """

    def __init__(self, memory: GlobalMemory, seed: int = 0, resident: int = 4, slice: int = 60) -> None:
        self.memory, self.random, self.resident, self.slice = memory, random.Random(seed), resident, slice
        self.notes: Counter[str] = Counter()
        self.instructions = 0

    def launch(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[bytes],
        shared_bytes: int = 0,
        ranks: int = 1,
    ) -> None:
        """Run a kernel to its end.

        Args:
            kernel: What to run.
            grid: Blocks along x, y, z; `ranks` neighbors along x form a cluster.
            threads: Of a block.
            arguments: The bytes of each parameter, in order.
            shared_bytes: Of a block, including what the kernel declares itself.
            ranks: Blocks of a cluster.

        Raises:
            Fault: An access out of bounds or misaligned, a divergent barrier, a deadlock.
        """
        if kernel.program is None:
            kernel.program = translate(kernel, KINDS)
        self.program: Program = kernel.program
        self.grid, self.threads = (*grid, 1, 1)[:3], threads
        self.shared_bytes = max(shared_bytes, kernel.shared_bytes, 16)
        self.parameters = np.zeros(max(kernel.parameter_bytes, 8), np.uint8)
        for (at, size), data in zip(kernel.parameters.values(), arguments, strict=False):
            assert len(data) <= size, (kernel.name, len(data), size)
            self.parameters[at : at + len(data)] = np.frombuffer(data, np.uint8)
        self.covered = np.zeros(len(kernel.instructions), bool)
        self.memory.begin_launch()
        with np.errstate(all="ignore"):
            self._run(ranks)

    def _run(self, ranks: int) -> None:
        x, y, z = self.grid
        ids = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        todo = [list(enumerate(ids))[at : at + ranks] for at in range(0, len(ids), ranks)] if len(ids) < 4096 else None
        assert todo is not None, "a grid too large to simulate"
        live: list[list[Block]] = []
        while todo or live:
            while todo and len(live) < self.resident:
                cluster = [Block(self, number, id) for number, id in todo.pop(0)]
                for block in cluster:
                    block.cluster = cluster
                live.append(cluster)
            ready = [warp for cluster in live for block in cluster for warp in block.warps if warp.state == "ready"]
            if not ready:
                raise Fault("deadlock: every warp waits")
            warp = self.random.choice(ready)
            before = warp.count
            warp.run(self.random.randint(1, self.slice))
            self.instructions += warp.count - before
            if warp.state != "ready":
                cluster = warp.block.cluster
                _pass_barriers(warp.block, cluster)
                if all(block.finished for block in cluster):
                    for block in cluster:
                        for one in block.warps:
                            if one.open_copies or any(one.copy_groups):
                                self.notes["a block ended while a cp.async was under way"] += 1
                    live.remove(cluster)


def _pass_barriers(block: Block, cluster: list[Block]) -> None:
    """Let warps continue whose barrier is complete."""
    states = {warp.state for warp in block.warps}
    if states == {"barrier"}:
        block.epoch += 1
        for warp in block.warps:
            warp.state = "ready"
    elif "barrier" in states and states <= {"barrier", "done"}:
        raise Fault("some warps of a block ended while others wait at a barrier")
    for warp in block.warps:
        if warp.state == "arrived":
            warp.state = "ready"
    if all(warp.state == "cluster" for one in cluster for warp in one.warps):
        for one in cluster:
            one.epoch += 1
            one.cluster_epoch += 1
            one.cluster_began = one.epoch
            for warp in one.warps:
                warp.state = "ready"
