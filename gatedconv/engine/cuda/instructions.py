"""The instruction list of a plan as a GPU runs it: channels padded, gathers and scatters inside convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.engine.layers import Pair
from gatedconv.engine.maps import Map, Step
from gatedconv.engine.pack import round_up

# Fields of `Instruction` that are those of its layer.
_OF_LAYER = "act kernel stride padding dilation groups weight bias offset counts_padding".split()


@dataclass
class Instruction:
    """One instruction. Maps are (N, C padded, H, W), channels_last, zeros in the padding.

    Attributes:
        op: "conv", "max_pool", "avg_pool", "mean_pool", "gather", "scatter_add", "subsample" or "add".
        name: The layer that it came from.
        source: The map that it reads.
        target: The map that it makes.
        residual: The map that is added, -1 for none.
        channels: (of source, of target), without padding.
        act: "relu", "relu6" or None.
        padding: Pixels at the top, left, bottom and right.
        weight: (C_out, C_in / groups, KH, KW), float64, of what is open; padded where the maps are.
        bias: (C_out,), float64.
        index: Channels of "gather" and "scatter_add".
        in_index: Channels of the source that "conv" reads, None for all.
        out_index: Channels of the target that "conv" writes, None for all; the others are act(residual).
        offset: Channels of the target in front of those of "subsample".
        counts_padding: Whether "avg_pool" divides by the window with its padding.
        dead: Maps that are not read after this instruction.
        keeps_closed: Whether act(residual) is residual: what is closed stays as it is in memory.
        macs: Multiply-adds an image, for the example's size.
    """

    op: str
    name: str
    source: int
    target: int
    residual: int = -1
    channels: Pair = (0, 0)
    act: str | None = None
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    index: list[int] = field(default_factory=list)
    in_index: list[int] | None = None
    out_index: list[int] | None = None
    offset: int = 0
    counts_padding: bool = False
    dead: tuple[int, ...] = ()
    keeps_closed: bool = False
    macs: int = 0

    @property
    def in_place(self) -> bool:
        """Whether the target may reuse the residual's memory: the residual is not read afterwards."""
        return self.residual in self.dead and self.residual != self.source


def padded(channels: int, dtype: torch.dtype) -> int:
    """Return the channels of a map in memory: pixels of whole 16-byte vectors, and as tensor cores require."""
    return round_up(channels, 16 // dtype.itemsize)


def make_instructions(steps: list[Step], maps: list[Map]) -> list[Instruction]:
    """Turn the steps of a plan into instructions; the first and the last step (input, output) are left out."""
    made = [_instruction(step, maps) for step in steps if step.layer is not None]
    made = _fuse(made, keep=steps[-1].source)
    _mark_nonnegative(made)
    last = {i: at for at, one in enumerate(made) for i in (one.source, one.residual) if i >= 0}
    for at, one in enumerate(made):
        read = {one.source, one.residual} - {-1, steps[-1].source}
        one.dead = tuple(sorted(i for i in read if last[i] == at))
    return made


def _instruction(step: Step, maps: list[Map]) -> Instruction:
    layer, target = step.layer, maps[step.target]
    assert layer is not None
    op = "conv" if step.op == "depthwise" else step.op
    made = Instruction(op, layer.name, step.source, step.target, step.residual)
    made.channels = (maps[step.source].channels, target.channels)
    for name in _OF_LAYER:
        setattr(made, name, getattr(layer, name))
    made.index = list(layer.index)
    if layer.weight is not None:
        made.macs = layer.weight.numel() * target.height * target.width
    return made


def _fuse(made: list[Instruction], keep: int) -> list[Instruction]:
    """Let convolutions read through a gather and write through a scatter, where nothing else reads the map between."""
    readers: dict[int, int] = {keep: 1}
    for one in made:
        for i in (one.source, one.residual):
            readers[i] = readers.get(i, 0) + 1
    maker: dict[int, Instruction] = {}
    fused: list[Instruction] = []
    for one in made:
        before = maker.get(one.source) if readers[one.source] == 1 else None
        if one.op == "conv" and one.groups == 1 and before is not None and before.op == "gather":
            one.in_index, one.source, one.channels = before.index, before.source, (before.channels[0], one.channels[1])
            fused = [other for other in fused if other is not before]
        elif one.op == "scatter_add" and before is not None and _can_scatter(before, one, fused):
            one.op, one.out_index, one.source = "conv", one.index, before.source
            one.channels = (before.channels[0], one.channels[1])
            for name in ("kernel", "stride", "padding", "dilation", "weight", "bias", "in_index", "macs"):
                setattr(one, name, getattr(before, name))
            one.name, one.index = before.name, []
            fused = [other for other in fused if other is not before]
        fused.append(one)
        maker[one.target] = one
    return fused


def _can_scatter(conv: Instruction, scatter: Instruction, fused: list[Instruction]) -> bool:
    if conv.op != "conv" or conv.groups != 1 or conv.act is not None or conv.residual >= 0:
        return False
    # What the convolution reads must still be there: nothing is overwritten that is read later.
    return conv.out_index is None and scatter.residual != conv.target and conv in fused


def _mark_nonnegative(made: list[Instruction]) -> None:
    """A ReLU of something that left a ReLU changes nothing."""
    least_zero: set[int] = set()
    for one in made:
        one.keeps_closed = one.act is None or (one.act == "relu" and one.residual in least_zero)
        if one.act is not None or (
            one.op in ("max_pool", "avg_pool", "mean_pool", "gather", "subsample") and one.source in least_zero
        ):
            least_zero.add(one.target)


def pad_weight(one: Instruction, dtype: torch.dtype) -> Tensor:
    """Return the weight of a convolution without groups, padded as its maps are: zeros."""
    assert one.weight is not None
    outputs, inputs = one.weight.shape[:2]
    more_in = 0 if one.in_index is not None else padded(inputs, dtype) - inputs
    more_out = 0 if one.out_index is not None else padded(outputs, dtype) - outputs
    return F.pad(one.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))


def pad_bias(one: Instruction, dtype: torch.dtype) -> Tensor:
    """Return the bias, zeros where there is none, padded as the target is."""
    assert one.weight is not None
    bias = one.bias if one.bias is not None else one.weight.new_zeros(one.weight.shape[0])
    more = 0 if one.out_index is not None else padded(len(bias), dtype) - len(bias)
    return F.pad(bias, (0, more))


def output_size(one: Instruction, size: Sequence[int]) -> tuple[int, int]:
    """Return height and width of the target for a source of this height and width."""
    top, left, bottom, right = one.padding
    whole = (size[0] + top + bottom, size[1] + left + right)
    reach = [d * (k - 1) + 1 for d, k in zip(one.dilation, one.kernel, strict=True)]
    return (whole[0] - reach[0]) // one.stride[0] + 1, (whole[1] - reach[1]) // one.stride[1] + 1


def map_sizes(instructions: Sequence[Instruction], first: int, size: Pair) -> dict[int, Pair]:
    """Return height and width of every map, where the map `first` is of this size."""
    sizes = {first: size}
    for one in instructions:
        height, width = sizes[one.source]
        if one.op in ("conv", "max_pool", "avg_pool"):
            sizes[one.target] = output_size(one, (height, width))
        elif one.op == "mean_pool":
            sizes[one.target] = (1, 1)
        else:
            sizes[one.target] = (-(-height // one.stride[0]), -(-width // one.stride[1]))
    return sizes
