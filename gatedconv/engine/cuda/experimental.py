"""The image-resident driver: a run of layers in one launch, the maps of an image in shared memory.

It has never run on a GPU, so only GATEDCONV_CUDA_KERNELS=experimental considers it. Three parts: which runs of a
plan's instructions fit into shared memory and where each map is placed; the stream of bytes that the driver reads, in
the order of use (csrc/cuda/experimental/resident.h); the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.engine.cuda.instructions import Instruction, pad_bias, pad_weight, padded
from gatedconv.engine.pack import round_up
from gatedconv.ops import cuda_conv

UNIT = 16  # bytes of channels that lie together
ITEM, PIECE = 256, 4096  # bytes of a record, of a piece of the stream
RECORD_AT, TABLE_AT = 16, 16 + ITEM  # behind 16 bytes of zeros
RINGS = (8, 4, 2)  # pieces at hand, the most first
OPS = ("conv", "subsample", "gather", "add", "mean_pool")

OP_NUMBERS = ("end", "load", "conv", "move", "mean", "save")
ACTS = (None, "relu", "relu6")
# (16-pixel fragments, 8-output fragments) of a warp that the library has code for.
TILES = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1), (8, 2))
WARPS, PASS_OUTPUTS, MOST_RANKS = 8, 64, 8

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
class Run:
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
        """Shared memory with that many pieces of the stream at hand."""
        return self.ring_at + pieces * PIECE + self.map_bytes

    @property
    def ring_at(self) -> int:
        """Where the pieces lie; the maps are behind them."""
        return TABLE_AT + self.table_bytes

    def ring(self, budget: int, ranks: int) -> int:
        """Pieces at hand: as many as leave room for a second image, unless blocks share one; 0 if none fits."""
        rooms = (budget,) if ranks > 1 else (budget // 2 - 1024, budget)
        return next((pieces for room in rooms for pieces in RINGS if self.shared_bytes(pieces) <= room), 0)


def find_runs(
    instructions: Sequence[Instruction], sizes: dict[int, Size], result: int, dtype: torch.dtype, budget: int
) -> list[Run]:
    """Return the longest runs that fit, in order, each of two convolutions or more.

    Args:
        instructions: Of a plan.
        sizes: Height and width of every map.
        result: The plan's last map.
        dtype: Of the maps.
        budget: Bytes of shared memory of a block.
    """
    runs: list[Run] = []
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
) -> Run | None:
    best = None
    made: set[int] = set()
    read: set[int] = set()
    for end in range(start + 1, len(instructions) + 1):
        one = instructions[end - 1]
        inputs = one.channels[0] if one.in_index is None else len(one.in_index)
        # A sum of nothing has no steps in the stream, which the driver could not follow.
        if one.op not in OPS or one.groups != 1 or (one.op == "conv" and not inputs):
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
) -> Run:
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
    return Run(start, end, source, result, builder.steps, builder.maps, round_up(table, UNIT), map_bytes)


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
                index = [-1] * one.option + list(range(one.channels[0]))
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
        """Give every place the zeros that the convolutions that read it want."""
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


@dataclass(frozen=True)
class Tile:
    """How the warps of a block share a convolution out: `groups` of `nt` fragments of outputs, passes over pixels."""

    mt: int
    nt: int
    groups: int
    passes: int

    @property
    def fragments(self) -> int:
        """16-pixel fragments of one pass."""
        return WARPS // self.groups * self.mt


def choose_tile(fragments: int, blocks: int) -> Tile:
    """Return the tile of least work for that many 16-pixel and 8-output fragments of a block.

    Counted for every step of a warp: a product of fragments as 2, what brings pixels as 1.5, weights as 1, the rest
    as 4; every pass reads the weights anew.
    """
    tiles: dict[Tile, float] = {}
    for mt, nt in TILES:
        groups = -(-blocks // nt)
        if groups <= WARPS and nt <= _power(blocks):
            tile = Tile(mt, nt, groups, -(-fragments // (WARPS // groups * mt)))
            tiles[tile] = tile.passes * (2 * mt * nt + 1.5 * mt + nt + 4)
    return min(tiles, key=lambda tile: tiles[tile])


def write_stream(run: Run, dtype: torch.dtype, ranks: int, pieces: int) -> Tensor:
    """Return the stream of a run: uint8, whole pieces, on the CPU.

    Args:
        run: Its steps and maps.
        dtype: Of the maps.
        ranks: Blocks that share an image.
        pieces: Of the stream that are at hand; the maps lie behind them.
    """
    writer = _Writer(run, dtype, ranks, pieces)
    for step in run.steps:
        writer.add(step)
    writer.append(_bytes(torch.zeros(1, dtype=torch.int32)))
    writer.pad(PIECE)
    return torch.cat(writer.parts)


def rows_needed(run: Run, ranks: int) -> dict[int, list[set[int]]]:
    """Return for every map the rows of it that each rank reads, or writes itself."""
    need = {number: [set(made.row_range(rank, ranks)) for rank in range(ranks)] for number, made in run.maps.items()}
    for step in reversed(run.steps):
        for rank in range(ranks):
            if step.source in run.maps:
                need[step.source][rank] |= _rows_read(run, step, rank, ranks)
            # What is left in place goes on as a part of the target.
            for number in {step.source, step.residual} & set(run.maps):
                if step.target in run.maps and run.maps[number].at == run.maps[step.target].at:
                    need[number][rank] |= need[step.target][rank]
    return need


def _rows_read(run: Run, step: ResidentStep, rank: int, ranks: int) -> set[int]:
    """The rows of its source that a step on one rank reads."""
    source = run.maps[step.source]
    if step.op == "save":
        return set(source.row_range(rank, ranks))
    computed = run.maps[step.target].row_range(rank, ranks)
    if step.op == "mean":
        return set(range(source.height)) if computed else set()
    if step.one is None:
        return {row * step.stride[0] for row in computed}
    one = step.one
    first = [row * one.stride[0] - one.padding[0] for row in computed]
    rows = {row + tap * one.dilation[0] for row in first for tap in range(one.kernel[0])}
    return {row for row in rows if 0 <= row < source.height}


class _Writer:
    """Bytes that are requested in powers of two, each aligned to its size."""

    def __init__(self, run: Run, dtype: torch.dtype, ranks: int, pieces: int) -> None:
        self.run, self.dtype, self.ranks = run, dtype, ranks
        self.maps_at = run.ring_at + pieces * PIECE
        self.need = rows_needed(run, ranks)
        self.parts: list[Tensor] = []
        self.size = 0

    def append(self, data: Tensor, request: int = ITEM) -> None:
        self.pad(request)
        self.parts.append(data)
        self.size += data.numel()
        self.pad(ITEM)

    def pad(self, multiple: int) -> None:
        count = -self.size % multiple
        self.parts.append(torch.zeros(count, dtype=torch.uint8))
        self.size += count

    def add(self, step: ResidentStep) -> None:
        if step.op == "conv":
            self._add_conv(step)
            return
        self._record(step)
        if step.op == "move":
            index = torch.tensor(step.index, dtype=torch.int32)
            for item in F.pad(index, (0, -len(index) % PASS_OUTPUTS), value=-1).view(-1, PASS_OUTPUTS):
                self.append(_bytes(item))

    def _add_conv(self, step: ResidentStep) -> None:
        """A record, weights and values for every pass over outputs and pixels."""
        one, source, target = step.one, self.run.maps[step.source], self.run.maps[step.target]
        assert one is not None
        weight, bias = pad_weight(one, self.dtype), pad_bias(one, self.dtype).float()
        rows = max(len(target.row_range(rank, self.ranks)) for rank in range(self.ranks))
        for first in range(0, weight.shape[0], PASS_OUTPUTS):
            part = slice(first, min(first + PASS_OUTPUTS, weight.shape[0]))
            behind = (0, first + PASS_OUTPUTS - part.stop)
            values = F.pad(bias[part], behind).view(torch.int32)
            if one.out_index is not None:
                values = torch.cat([values, F.pad(torch.tensor(one.out_index[part]).int(), behind, value=-1)])
            blocks = -(-(part.stop - first) // 8)
            tile, wide = choose_tile(-(-rows * target.width // 16), blocks), _power(blocks)
            packed = pack_fragments(weight[part], source.units, wide, self.dtype)
            units = one.kernel[0] * one.kernel[1] * source.units
            for at in range(tile.passes):
                numbers = [tile.mt, tile.nt, tile.groups, wide, sum_steps(step, self.run.maps), units]
                numbers += [at * tile.fragments, first, int(one.out_index is not None)]
                self._record(step, numbers, clear=step.clear and first == at == 0)
                self.append(packed, wide * ITEM)
                self.append(_bytes(values), values.numel() * 4)

    def _record(self, step: ResidentStep, conv: Sequence[int] = (0,) * 9, clear: bool | None = None) -> None:
        numbers = [OP_NUMBERS.index(step.op), ACTS.index(step.act)]
        for number in (step.source, step.target, step.residual):
            numbers += self._map(number)
        one = step.one or Instruction("move", "", 0, 0, stride=step.stride)
        numbers.append(int(step.clear if clear is None else clear))
        numbers += [one.kernel[1], *one.stride, *one.padding[:2], *one.dilation, *conv]
        for rows in self.need.get(step.target, []):
            numbers.append(min(rows) << 16 | max(rows) + 1 if rows else 0)
        self.append(_bytes(torch.tensor(numbers, dtype=torch.int32)))

    def _map(self, number: int) -> list[int]:
        if number not in self.run.maps:
            return [0] * 7
        made = self.run.maps[number]
        return [self.maps_at + made.at, made.plane, made.pitch, made.halo, made.units, made.height, made.width]


def pack_fragments(weight: Tensor, units: int, blocks: int, dtype: torch.dtype) -> Tensor:
    """Pack weights in the order in which the lanes of a warp hold them.

    Args:
        weight: (outputs, C_in, KH, KW), float64.
        units: Of the source's channels.
        blocks: Of 8 outputs, zeros behind the last.
        dtype: float16, bfloat16, or float32 for tf32.

    Returns:
        uint8 [step][block][lane][2 registers of 4 bytes]: `mma.m16n8`'s second operand (8 outputs: lane / 4; the
        unit: the register; 4 bytes of the unit: lane % 4).
    """
    channels = UNIT // dtype.itemsize
    weight = F.pad(weight, (0, 0, 0, 0, 0, units * channels - weight.shape[1], 0, 8 * blocks - weight.shape[0]))
    sums = weight.permute(0, 2, 3, 1).reshape(8 * blocks, -1)
    sums = F.pad(sums, (0, -sums.shape[1] % (2 * channels)))
    lanes = sums.view(blocks, 8, -1, 2, 4, channels // 4).permute(2, 0, 1, 4, 3, 5)
    return _bytes(_as_tf32(lanes) if dtype == torch.float32 else lanes.to(dtype))


def _as_tf32(values: Tensor) -> Tensor:
    """Round to 10 bits of mantissa, ties away from zero, as `cvt.rna.tf32` does; what is not finite stays."""
    bits = values.float().contiguous().view(torch.int32)
    rounded = (bits + (1 << 12)) & ~((1 << 13) - 1)
    return torch.where(values.isfinite(), rounded, bits).view(torch.float32)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _power(blocks: int) -> int:
    """The least power of two that is not below."""
    return 1 << (blocks - 1).bit_length()


@dataclass(frozen=True)
class Limits:
    """What a GPU gives a block.

    Attributes:
        shared_bytes: Shared memory, of those that ask for more than 48 KiB.
        ranks: Numbers of blocks that can share an image, 1 first.
    """

    shared_bytes: int
    ranks: tuple[int, ...]


def limits(device: torch.device, dtype: torch.dtype) -> Limits | None:
    """Return the limits of a device, None where the driver does not serve it or the dtype.

    It multiplies on tensor cores alone: float32 only where PyTorch's own settings allow tf32.
    """
    if device.type != "cuda":
        return None
    if not cuda_conv.takes(torch.empty(0, dtype=dtype, device=device), (1, 1), (1, 1), 1):
        return None
    properties = torch.cuda.get_device_properties(device)
    if dtype == torch.float32 and (properties.major < 8 or not cuda_conv.allows_tf32()):
        return None
    most = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not annotated in torch 2.14
    return Limits(most, (1, 2, 4, 8) if properties.major >= 9 else (1,))


def resident_run(input: Tensor, stream: Tensor, output: Tensor, layout: Sequence[int], tf32: bool) -> Tensor:
    """Take every image of `input` through a run of layers, write `output` and return it."""
    torch.ops.gatedconv.resident_run.default(input, stream, output, layout, tf32)
    return output


class ResidentLaunch:
    """A run of layers in one launch, an image's maps in shared memory."""

    def __init__(self, run: Run, dtype: torch.dtype, device: torch.device, ranks: int, budget: int) -> None:
        pieces = run.ring(budget, ranks)
        if not pieces:
            raise RuntimeError(f"the run's maps do not fit into {budget} bytes of shared memory")
        self.tf32 = dtype == torch.float32
        self.stream = write_stream(run, dtype, ranks, pieces).to(device)
        source, result = run.maps[run.source], run.maps[run.result]
        self.layout = [ranks, pieces, RECORD_AT, TABLE_AT, run.ring_at, run.shared_bytes(pieces)]
        self.layout += [number for made in (source, result) for number in (made.units, made.height, made.width)]
        self.size = (result.units * UNIT // dtype.itemsize, result.height, result.width)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Take x (N, C padded, H, W), channels last, through the run."""
        size = (x.shape[0], *self.size)
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return resident_run(x, self.stream, out, self.layout, self.tf32)
