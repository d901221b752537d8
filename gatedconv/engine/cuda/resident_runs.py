"""Which runs of a plan's instructions fit into the shared memory of a GPU's block, and where each map is placed.

`resident` writes the stream of such a run and launches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gatedconv.engine.cuda.instructions import Instruction, padded
from gatedconv.engine.pack import round_up

UNIT = 16  # bytes of channels that are stored together
ITEM, PIECE = 256, 4096  # bytes of a record, of a piece of the stream
RECORD_AT, TABLE_AT = 16, 16 + ITEM  # behind 16 bytes of zeros
RINGS = (8, 4, 2)  # pieces in shared memory, the most first
RESIDENT_OPS = ("conv", "subsample", "gather", "add", "mean_pool")

Size = tuple[int, int]


@dataclass
class ResidentMap:
    """A map in shared memory: planes of units, zeros around (csrc/cuda/experimental/resident.h).

    Attributes:
        units: Groups of channels of 16 bytes.
        halo: Pixels of zeros above and below, and between one row and the next.
        at: Bytes from the begin of shared memory; maps that are never needed at the same time share places.
    """

    units: int
    height: int
    width: int
    halo: int = 0
    at: int = -1

    @property
    def pitch(self) -> int:
        """Pixels from one row to the next."""
        return self.width + self.halo

    @property
    def plane(self) -> int:
        """Bytes of a unit of every pixel, zeros included."""
        return ((self.height + 2 * self.halo) * self.pitch + self.halo) * UNIT

    def row_range(self, rank: int, ranks: int) -> range:
        """The rows that one block of a cluster computes."""
        return range(rank * self.height // ranks, (rank + 1) * self.height // ranks)


@dataclass
class ResidentStep:
    """One instruction of the driver.

    Attributes:
        op: "load", "conv", "move", "mean" or "save".
        source: Map that it reads, -1 for the run's input.
        target: Map that it makes, -1 for the run's output.
        residual: Map that it adds, -1 for none.
        one: What a "conv" computes.
        index: Of "move", the source's channel for each of the target's; -1 for zero, -2 to leave it.
        stride: Of "move".
        clear: Whether the target begins here, so that its border must be zeroed.
    """

    op: str
    source: int = -1
    target: int = -1
    residual: int = -1
    one: Instruction | None = None
    index: list[int] = field(default_factory=list)
    stride: Size = (1, 1)
    act: str | None = None
    clear: bool = True


@dataclass
class ResidentRun:
    """Consecutive instructions that one launch computes.

    Attributes:
        start: The first instruction's position in the plan.
        end: Behind the last.
        source: The map that it reads from outside.
        result: The only map of it that is read outside.
        steps: What the driver does.
        maps: Its maps, by number.
        table_bytes: Of the offsets of the longest sum.
        map_bytes: Of all maps together.
    """

    start: int
    end: int
    source: int
    result: int
    steps: list[ResidentStep]
    maps: dict[int, ResidentMap]
    table_bytes: int
    map_bytes: int

    def shared_bytes(self, pieces: int) -> int:
        """Shared memory with that many pieces of the stream in it."""
        return self.ring_at + pieces * PIECE + self.map_bytes

    @property
    def ring_at(self) -> int:
        """The offset of the pieces; the maps follow them."""
        return TABLE_AT + self.table_bytes

    def ring(self, budget: int, ranks: int) -> int:
        """Pieces buffered: as many as leave room for a second image, unless blocks share one image; 0 if none fits."""
        rooms = (budget,) if ranks > 1 else (budget // 2 - 1024, budget)
        return next((pieces for room in rooms for pieces in RINGS if self.shared_bytes(pieces) <= room), 0)


def find_runs(
    instructions: Sequence[Instruction], sizes: dict[int, Size], result: int, dtype: torch.dtype, budget: int
) -> list[ResidentRun]:
    """Return the longest runs that fit, in order, each of two convolutions or more.

    Args:
        instructions: Of a plan.
        sizes: Height and width of every map.
        result: The plan's last map.
        dtype: Of the maps.
        budget: Bytes of shared memory of a block.
    """
    runs: list[ResidentRun] = []
    start = 0
    while start < len(instructions):
        run = _longest_from(instructions, start, sizes, result, dtype, budget)
        if run is not None:
            runs.append(run)
        start = run.end if run is not None else start + 1
    return runs


def _longest_from(
    instructions: Sequence[Instruction],
    start: int,
    sizes: dict[int, Size],
    result: int,
    dtype: torch.dtype,
    budget: int,
) -> ResidentRun | None:
    best = None
    made: set[int] = set()
    read: set[int] = set()
    for end in range(start + 1, len(instructions) + 1):
        one = instructions[end - 1]
        inputs = one.channels[0] if one.in_index is None else len(one.in_index)
        # A sum of nothing has no steps in the stream, which the driver could not follow.
        if one.op not in RESIDENT_OPS or one.groups != 1 or (one.op == "conv" and not inputs):
            break
        read |= {i for i in (one.source, one.residual) if i >= 0 and i not in made}
        made.add(one.target)
        if len(read) > 1:
            break
        after = {i for later in instructions[end:] for i in (later.source, later.residual)} | {result}
        convs = sum(one.op == "conv" for one in instructions[start:end])
        if made & after != {one.target} or convs < 2:
            continue
        run = lay_out_run(instructions[start:end], start, next(iter(read)), sizes, dtype)
        if run.ring(budget, 2) == 0:
            break
        best = run
    return best


def lay_out_run(
    instructions: Sequence[Instruction], start: int, source: int, sizes: dict[int, Size], dtype: torch.dtype
) -> ResidentRun:
    """Return the steps of a run and the places of its maps."""
    result = instructions[-1].target
    builder = _Builder(sizes, dtype)
    builder.begin(source, next(one.channels[0] for one in instructions if one.source == source))
    for one in instructions:
        builder.add(one)
    builder.steps.append(ResidentStep("save", result, clear=False))
    builder.widen_halos()
    map_bytes = builder.place_maps()
    table = max((8 * sum_steps(step, builder.maps) for step in builder.steps if step.op == "conv"), default=0)
    end = start + len(instructions)
    return ResidentRun(start, end, source, result, builder.steps, builder.maps, round_up(table, UNIT), map_bytes)


def sum_steps(step: ResidentStep, maps: dict[int, ResidentMap]) -> int:
    """Return the steps, of two units each, of a convolution's sum."""
    assert step.one is not None
    return -(-step.one.kernel[0] * step.one.kernel[1] * maps[step.source].units // 2)


class _Builder:
    """Turns instructions into steps and places their maps."""

    def __init__(self, sizes: dict[int, Size], dtype: torch.dtype) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.steps: list[ResidentStep] = []
        self.maps: dict[int, ResidentMap] = {}
        self.place: dict[int, int] = {}  # map -> the map whose place it takes

    def begin(self, source: int, channels: int) -> None:
        self._new(source, channels, self.sizes[source])
        self.steps.append(ResidentStep("load", target=source))

    def _new(self, number: int, channels: int, size: Size, place: int = -1) -> None:
        self.maps[number] = ResidentMap(padded(channels, self.dtype) * self.dtype.itemsize // UNIT, *size)
        self.place[number] = self.place[place] if place >= 0 else number

    def _index(self, target: int, index: list[int]) -> list[int]:
        """A list for every channel of the target, padding included."""
        channels = self.maps[target].units * UNIT // self.dtype.itemsize
        return index + [-1] * (channels - len(index))

    def add(self, one: Instruction) -> None:
        in_place = one.op == "conv" and one.in_place
        self._new(one.target, one.channels[1], self.sizes[one.target], one.residual if in_place else -1)
        if one.op == "conv":
            self._add_conv(one)
        elif one.op == "mean_pool":
            self.steps.append(ResidentStep("mean", one.source, one.target))
        else:
            if one.op == "subsample":
                index = [-1] * one.offset + list(range(one.channels[0]))
            else:
                index = one.index or list(range(one.channels[0]))
            stride = one.stride if one.op == "subsample" else (1, 1)
            index = self._index(one.target, index)
            self.steps.append(ResidentStep("move", one.source, one.target, one.residual, None, index, stride, one.act))

    def _add_conv(self, one: Instruction) -> None:
        source, clear = one.source, not one.in_place
        if one.in_index is not None:
            source = -2 - len(self.steps)  # a map of its own
            self._new(source, len(one.in_index), self.sizes[one.source])
            self.steps.append(ResidentStep("move", one.source, source, index=self._index(source, one.in_index)))
        if one.out_index is not None and not (one.in_place and one.keeps_closed):
            rest = -2 if one.in_place else -1
            index = [rest if channel in one.out_index else channel for channel in range(one.channels[1])]
            index = self._index(one.target, index)
            if one.in_place:
                index[one.channels[1] :] = [-2] * (len(index) - one.channels[1])
            self.steps.append(ResidentStep("move", one.residual, one.target, index=index, act=one.act, clear=clear))
            clear = False
        self.steps.append(ResidentStep("conv", source, one.target, one.residual, one, act=one.act, clear=clear))

    def widen_halos(self) -> None:
        """Give every place the zeros that the convolutions reading it need."""
        halos: dict[int, int] = {}
        for step in self.steps:
            if step.op == "conv":
                assert step.one is not None
                reach = _reach(step.one, self.maps[step.source], self.maps[step.target])
                place = self.place[step.source]
                halos[place] = max(halos.get(place, 0), reach)
        for number, made in self.maps.items():
            made.halo = halos.get(self.place[number], 0)

    def place_maps(self) -> int:
        """Place maps, the largest first, where there is room as long as they live; returns the bytes of all."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, step in enumerate(self.steps):
            for number in {step.source, step.target, step.residual} & set(self.maps):
                first.setdefault(self.place[number], at)
                last[self.place[number]] = at
        placed: list[int] = []
        for place in sorted(first, key=lambda place: (-self._bytes(place), first[place])):
            rivals = [p for p in placed if last[p] >= first[place] and first[p] <= last[place]]
            at = 0
            for rival in sorted(rivals, key=lambda p: self.maps[p].at):
                if at + self._bytes(place) <= self.maps[rival].at:
                    break
                at = max(at, self.maps[rival].at + self._bytes(rival))
            self.maps[place].at = at
            placed.append(place)
        for number, made in self.maps.items():
            made.at = self.maps[self.place[number]].at
        return max(made.at + self._bytes(number) for number, made in self.maps.items())

    def _bytes(self, number: int) -> int:
        return self.maps[number].units * self.maps[number].plane


def _reach(one: Instruction, source: ResidentMap, target: ResidentMap) -> int:
    """Pixels outside of a map that a convolution reads, on the side where they are most."""
    reach = max(one.padding[:2])
    for axis, (ins, outs) in enumerate(((source.height, target.height), (source.width, target.width))):
        last = (outs - 1) * one.stride[axis] - one.padding[axis] + one.dilation[axis] * (one.kernel[axis] - 1)
        reach = max(reach, last - (ins - 1))
    return max(reach, 0)
