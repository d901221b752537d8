"""The image-resident driver: a run of layers in one launch, the maps of an image in shared memory.

On an H200 it gains at batch 256 and loses at 1 and 32, so only GATEDCONV_CUDA_KERNELS=experimental considers it.
`resident_runs` places the maps; here are the stream of bytes that the driver reads, in the order of use
(csrc/cuda/experimental/resident.h), and the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.engine.cuda.instructions import Instruction, pad_bias, pad_weight
from gatedconv.engine.cuda.resident_runs import (
    ITEM,
    PIECE,
    RECORD_AT,
    TABLE_AT,
    UNIT,
    ResidentRun,
    ResidentStep,
    sum_steps,
)
from gatedconv.ops import _masked_conv2d_cuda

OP_NUMBERS = ("end", "load", "conv", "move", "mean", "save")
RESIDENT_ACTS = (None, "relu", "relu6")
# (16-pixel fragments, 8-output fragments) of a warp that the library has code for.
TILES = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1), (8, 2))
WARPS, PASS_OUTPUTS = 8, 64


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


def write_stream(run: ResidentRun, dtype: torch.dtype, ranks: int, pieces: int) -> Tensor:
    """Return the stream of a run: uint8, whole pieces, on the CPU.

    Args:
        run: Its steps and maps.
        dtype: Of the maps.
        ranks: Blocks that share an image.
        pieces: Of the stream that are in shared memory; the maps follow them.
    """
    writer = _Writer(run, dtype, ranks, pieces)
    for step in run.steps:
        writer.add(step)
    writer.append(_bytes(torch.zeros(1, dtype=torch.int32, device="cpu")))
    writer.pad(PIECE)
    return torch.cat(writer.parts)


def rows_needed(run: ResidentRun, ranks: int) -> dict[int, list[set[int]]]:
    """Return for every map the rows of it that each rank reads, or writes itself."""
    need = {number: [set(made.row_range(rank, ranks)) for rank in range(ranks)] for number, made in run.maps.items()}
    for step in reversed(run.steps):
        for rank in range(ranks):
            if step.source in run.maps:
                need[step.source][rank] |= _rows_read(run, step, rank, ranks)
            # A map updated in place becomes part of the target.
            for number in {step.source, step.residual} & set(run.maps):
                if step.target in run.maps and run.maps[number].at == run.maps[step.target].at:
                    need[number][rank] |= need[step.target][rank]
    return need


def _rows_read(run: ResidentRun, step: ResidentStep, rank: int, ranks: int) -> set[int]:
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

    def __init__(self, run: ResidentRun, dtype: torch.dtype, ranks: int, pieces: int) -> None:
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
        self.parts.append(torch.zeros(count, dtype=torch.uint8, device="cpu"))
        self.size += count

    def add(self, step: ResidentStep) -> None:
        if step.op == "conv":
            self._add_conv(step)
            return
        self._record(step)
        if step.op == "move":
            index = torch.tensor(step.index, dtype=torch.int32, device="cpu")
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
                values = torch.cat(
                    [values, F.pad(torch.tensor(one.out_index[part], device="cpu").int(), behind, value=-1)]
                )
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
        numbers = [OP_NUMBERS.index(step.op), RESIDENT_ACTS.index(step.act)]
        for number in (step.source, step.target, step.residual):
            numbers += self._map(number)
        one = step.one or Instruction("move", "", 0, 0, stride=step.stride)
        numbers.append(int(step.clear if clear is None else clear))
        numbers += [one.kernel[1], *one.stride, *one.padding[:2], *one.dilation, *conv]
        for rows in self.need.get(step.target, []):
            numbers.append(min(rows) << 16 | max(rows) + 1 if rows else 0)
        self.append(_bytes(torch.tensor(numbers, dtype=torch.int32, device="cpu")))

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
    """The resources that a GPU gives a block.

    Attributes:
        shared_bytes: Shared memory of a block that requests more than 48 KiB.
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
    if not _masked_conv2d_cuda.supports(torch.empty(0, dtype=dtype, device=device), (1, 1), (1, 1), 1):
        return None
    properties = torch.cuda.get_device_properties(device)
    if dtype == torch.float32 and (properties.major < 8 or not _masked_conv2d_cuda.allows_tf32()):
        return None
    most = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not annotated in torch 2.14
    return Limits(most, (1, 2, 4, 8) if properties.major >= 9 else (1,))


def resident_run(input: Tensor, stream: Tensor, output: Tensor, layout: Sequence[int], tf32: bool) -> Tensor:
    """Take every image of `input` through a run of layers, write `output` and return it."""
    torch.ops.gatedconv.resident_run.default(input, stream, output, layout, tf32)
    return output


class ResidentLaunch:
    """A run of layers in one launch, an image's maps in shared memory."""

    def __init__(self, run: ResidentRun, dtype: torch.dtype, device: torch.device, ranks: int, budget: int) -> None:
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
