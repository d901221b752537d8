"""Writes a plan: places maps in slots of the workspace, encodes layers and weights (csrc/cpu/plan.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gatedconv.engine.layers import Layer
from gatedconv.engine.pack import (
    PANEL,
    pack_depthwise,
    pack_grouped,
    pack_panels,
    pack_winograd,
    round_up,
)

VERSION = 2
OPS = (
    "input",
    "output",
    "conv",
    "winograd2",
    "winograd4",
    "depthwise",
    "max_pool",
    "avg_pool",
    "mean_pool",
    "gather",
    "scatter_add",
    "subsample",
    "add",
    "fill",
)
ACTS = (None, "relu", "relu6")


@dataclass
class Map:
    """A feature map of the plan.

    Attributes:
        channels: Its channels.
        height: Rows for the example input; as `width`, only for reports and choices, not part of the program.
        width: Columns for the example input.
        pixel: Floats from one pixel to the next.
        halo: Pixels of zeros around it, as many as its readers' padding.
        multiple: The border at the bottom and right is widened until height and width are multiples of this.
        slot: Its place in the workspace; maps that are never needed at the same time share one.
    """

    channels: int
    height: int
    width: int
    pixel: int = 0
    halo: int = 0
    multiple: int = 1
    slot: int = -1


@dataclass
class Step:
    """One instruction, as encoded and as reported."""

    op: str
    layer: Layer | None
    source: int
    target: int
    residual: int = -1
    macs: int = 0
    weight_bytes: int = 0


@dataclass
class Program:
    """A packed plan: `code` (int64) and `weights` (float32) are all that the operator needs."""

    code: Tensor
    weights: Tensor
    steps: list[Step]
    maps: list[Map]
    shape: list[
        int
    ]  # how the output's size follows from the input's: see gatedconv.ops.plan.plan_output_size


def lay_out(
    source: fx.Node, layers: list[Layer], result: fx.Node, batch: int
) -> tuple[list[Step], list[Map], list[int]]:
    """Return the steps of a segment from `source` to `result`, its maps, and the shape of a `Program`."""
    maps: list[Map] = []
    of: dict[fx.Node, int] = {}

    def new_map(node: fx.Node) -> int:
        of[node] = len(maps)
        shape = tuple(node.meta["tensor_meta"].shape) + (1, 1)
        maps.append(Map(*shape[1:4]))
        return of[node]

    steps = [Step("input", None, -1, new_map(source))]
    for layer in layers:
        if layer.kind == "alias":
            of[layer.output] = of[layer.inputs[0]]
            continue
        read = of[layer.inputs[0]]
        residual = of[layer.residual] if layer.residual is not None else -1
        steps.append(Step(_choose_op(layer, maps[read], batch), layer, read, new_map(layer.output), residual))
    steps.append(Step("output", None, of[result], -1))
    shape = [maps[steps[-1].source].channels, len(result.meta["tensor_meta"].shape), *_windows(steps)]
    return steps, maps, shape


def write_program(source: fx.Node, layers: list[Layer], result: fx.Node, batch: int) -> Program:
    """Pack the fused layers of a segment from `source` to `result`, at its best for `batch` images."""
    steps, maps, shape = lay_out(source, layers, result, batch)
    _shape_maps(steps, maps)
    _place_maps(steps, maps)
    weights = _Blob()
    lists: list[int] = [0]
    fields = [_encode(step, maps, weights, lists) for step in steps]
    header = [VERSION, len(maps), len(steps), 4 + 5 * len(maps) + sum(map(len, fields))]
    described = [number for m in maps for number in (m.channels, m.pixel, m.halo, m.multiple, m.slot)]
    code = header + described + [number for field in fields for number in field] + lists
    return Program(torch.tensor(code, dtype=torch.int64, device="cpu"), weights.tensor(), steps, maps, shape)


def _windows(steps: list[Step]) -> list[int]:
    """Extent, stride and padding of every layer on the way to the output that changes a map's size."""
    maker = {step.target: step for step in steps}
    windows: list[int] = []
    at = steps[-1].source
    while (layer := maker[at].layer) is not None:
        extent = [d * (k - 1) + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True)]
        padding = [layer.padding[0] + layer.padding[2], layer.padding[1] + layer.padding[3]]
        if layer.kind == "mean_pool":
            windows = [0] * 6 + windows
        elif layer.stride != (1, 1) or [e - p for e, p in zip(extent, padding, strict=True)] != [1, 1]:
            rows = [n for e, s, p in zip(extent, layer.stride, padding, strict=True) for n in (e, s, p)]
            windows = rows + windows
        at = maker[at].source
    return windows


def _choose_op(layer: Layer, read: Map, batch: int) -> str:
    if layer.kind != "conv":
        return layer.kind
    assert layer.weight is not None
    out_channels, per_group = layer.weight.shape[:2]
    if layer.groups > 1 and per_group == 1 and out_channels == layer.groups:
        return "depthwise"
    plain = layer.groups == 1 and layer.stride == (1, 1) and layer.dilation == (1, 1)
    if plain and layer.kernel == (3, 3) and layer.padding == (1, 1, 1, 1):
        return _choose_winograd(layer, read, batch)
    return "conv"


def _choose_winograd(layer: Layer, read: Map, batch: int) -> str:
    """The cheapest of direct, F(2) and F(4), in multiply-adds; the factors are measured."""
    assert layer.weight is not None
    out_channels, in_channels = layer.weight.shape[:2]
    if in_channels < 5:
        return "conv"
    costs = {}
    for name, tile in (("conv", 1), ("winograd2", 2), ("winograd4", 4)):
        tiles = -(-read.height // tile) * -(-read.width // tile)
        points = (tile + 2) ** 2
        weights = points * in_channels * out_channels
        transforms = 6 * points * (in_channels + out_channels) if tile > 1 else 0
        # What a cache cannot keep comes from memory once for a group of images: seven multiply-adds a weight.
        fetched = max(weights - 2**18, 0) / min(max(batch, 1), 8)
        costs[name] = tiles * (weights + transforms) + 7 * fetched
    return min(costs, key=lambda name: costs[name])


def _shape_maps(steps: list[Step], maps: list[Map]) -> None:
    """Give every map the border and the pixel that its readers want."""
    for i, m in enumerate(maps):
        readers = [step for step in steps if i in (step.source, step.residual)]
        for step in readers:
            if step.source == i and step.layer is not None and step.op not in ("max_pool", "avg_pool"):
                m.halo = max(m.halo, *step.layer.padding)
                m.multiple = max(m.multiple, {"winograd2": 2, "winograd4": 4}.get(step.op, 1))
        # Only direct convolution reads single channels; everything else reads whole vectors.
        narrow = all(
            s.op == "conv" and s.layer is not None and s.layer.groups == 1 and s.residual != i
            for s in readers
        )
        if i == steps[0].target and narrow and m.channels < PANEL:
            m.pixel = m.channels
        else:
            m.pixel = round_up(m.channels, PANEL)
            # Pixels a multiple of 2 KiB apart share too few sets of the first cache.
            m.pixel += PANEL if m.pixel % 512 == 0 else 0


def _place_maps(steps: list[Step], maps: list[Map]) -> None:
    """Linear scan over the steps: a slot is free again after the last reader of its map."""
    last_read = {i: at for at, step in enumerate(steps) for i in (step.source, step.residual) if i >= 0}
    free: list[int] = []
    slots = 0
    for at, step in enumerate(steps):
        if step.target >= 0:
            m = maps[step.target]
            if free:
                m.slot = free.pop()
            else:
                m.slot, slots = slots, slots + 1
        for i in {step.source, step.residual} - {-1}:
            if last_read[i] == at:
                free.append(maps[i].slot)


def _zeros(count: int) -> Tensor:
    # Whatever defaults for dtype and device the user has set.
    return torch.zeros(count, dtype=torch.float32, device="cpu")


class _Blob:
    """The weights of a plan, one after another, each on a cache line."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = [_zeros(PANEL)]
        self.size = PANEL

    def add(self, values: Tensor) -> int:
        start = self.size
        padded = _zeros(round_up(values.numel(), PANEL))
        padded[: values.numel()] = values.float()
        self.parts.append(padded)
        self.size += padded.numel()
        return start

    def tensor(self) -> Tensor:
        # A vector load of the last bias may reach past it.
        return torch.cat([*self.parts, _zeros(2 * PANEL)])


def _encode(step: Step, maps: list[Map], weights: _Blob, lists: list[int]) -> list[int]:
    layer = step.layer
    if layer is None:
        return [
            OPS.index(step.op),
            step.source,
            step.target,
            -1,
            0,
            1,
            1,
            1,
            1,
            0,
            0,
            0,
            0,
            1,
            1,
            0,
            0,
            0,
            0,
            0,
            0,
        ]
    weight_at = direct_at = bias_at = span = index_at = 0
    index = layer.index
    if layer.weight is not None:
        packed, span, starts = _pack(step.op, layer)
        index = index or starts
        weight_at = weights.add(packed)
        if step.op.startswith("winograd"):
            # For images with a NaN or an infinity, which Winograd's transforms would spread.
            direct_at = weights.add(pack_panels(layer.weight))
        bias = layer.bias if layer.bias is not None else _zeros(layer.weight.shape[0])
        bias_at = weights.add(torch.nn.functional.pad(bias, (0, -bias.numel() % PANEL)))
        target = maps[step.target]
        step.macs = layer.weight.numel() * target.height * target.width
        step.weight_bytes = 4 * packed.numel()
    elif layer.bias is not None:
        bias_at = weights.add(torch.nn.functional.pad(layer.bias, (0, -layer.bias.numel() % PANEL)))
    if index:
        index_at = len(lists)
        lists += [len(index), *index]
    top, left, bottom, right = layer.padding
    return [
        OPS.index(step.op),
        step.source,
        step.target,
        step.residual,
        ACTS.index(layer.act),
        *layer.kernel,
        *layer.stride,
        top,
        left,
        bottom,
        right,
        *layer.dilation,
        weight_at,
        bias_at,
        span,
        index_at,
        layer.option,
        direct_at,
    ]


def _pack(op: str, layer: Layer) -> tuple[Tensor, int, list[int]]:
    assert layer.weight is not None
    if op == "depthwise":
        return pack_depthwise(layer.weight), 1, []
    if op in ("winograd2", "winograd4"):
        return pack_winograd(layer.weight, int(op[-1])), layer.weight.shape[1], []
    if layer.groups > 1:
        return pack_grouped(layer.weight, layer.groups)
    return pack_panels(layer.weight), layer.weight.shape[1], []
