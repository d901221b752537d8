"""Writes a plan: encodes its maps, layers and weights (csrc/cpu/plan.h)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gatedconv.engine.choose import Choose, algorithms, choose_estimated
from gatedconv.engine.layers import Layer, map_size
from gatedconv.engine.maps import Map, Step, join_maps, place_maps, shape_maps
from gatedconv.engine.pack import (
    PANEL,
    has_groups_of_8,
    pack_bf16,
    pack_depthwise,
    pack_grouped,
    pack_groups_of_8,
    pack_panels,
    pack_winograd,
    round_up,
)

# A program is its header, the fields of every map, those of every step, and lists of channels (csrc/cpu/plan.h).
HEADER = ("version", "maps", "steps", "lists")  # how many maps and steps, and where the lists begin
MAP_FIELDS = ("channels", "pixel", "halo", "multiple", "slot", "offset")
VERSION = 1  # of the encoding, and of files: GATEDCONV_PLAN_FILE_VERSION in csrc/cpu/gatedconv_plan.h
OPS = (
    "input output conv winograd2 winograd4 depthwise max_pool avg_pool mean_pool gather scatter_add subsample add "
    "fill multiply view copy adaptive_max_pool adaptive_avg_pool nearest bilinear pixel_shuffle layer_norm "
    "group_norm softmax prelu"
).split()
ACTS = (None, *"relu relu6 leaky_relu elu silu hard_swish hard_sigmoid sigmoid tanh gelu gelu_tanh mish".split())


@dataclass
class Program:
    """A packed plan: `code` (int64) and `weights` (float32) are all that the operator needs."""

    code: Tensor
    weights: Tensor
    steps: list[Step]
    maps: list[Map]
    shape: list[int]  # how the output's size follows from the input's: see gatedconv.ops.plan.plan_output_size


def lay_out(
    source: fx.Node, layers: list[Layer], result: fx.Node, batch: int, choose: Choose
) -> tuple[list[Step], list[Map], list[int]]:
    """Return the steps of a segment from `source` to `result`, its maps, and the shape of a `Program`."""
    maps: list[Map] = []
    of: dict[fx.Node, int] = {}

    def new_map(node: fx.Node) -> int:
        of[node] = len(maps)
        maps.append(Map(*map_size(node)))
        return of[node]

    steps = [Step("input", None, -1, new_map(source))]
    for layer in layers:
        if layer.kind == "alias":
            of[layer.output] = of[layer.inputs[0]]
            continue
        reads = [of[node] for node in layer.inputs]
        residual = of[layer.residual] if layer.residual is not None else -1
        gate = of[layer.gate] if layer.gate is not None else -1
        op = _choose_op(layer, batch, choose)
        parts = tuple(reads) if op == "cat" else ()
        steps.append(Step(op, layer, reads[0], new_map(layer.output), residual, gate, parts))
    steps.append(Step("output", None, of[result], -1))
    shape = [maps[steps[-1].source].channels, len(result.meta["tensor_meta"].shape), *_size_changes(steps)]
    return steps, maps, shape


def write_program(
    source: fx.Node,
    layers: list[Layer],
    result: fx.Node,
    batch: int,
    choose: Choose = choose_estimated,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Pack the fused layers of a segment from `source` to `result`, at its best for `batch` images.

    In bfloat16 all dense convolutions and linear layers are products of that type; everything else is float32.
    """
    steps, maps, shape = lay_out(source, layers, result, batch, choose)
    if dtype == torch.bfloat16:
        for step in steps:
            if step.layer is not None and step.layer.kind == "conv" and step.layer.groups == 1:
                step.op = "bf16"
    steps = join_maps(steps, maps)
    shape_maps(steps, maps)
    place_maps(steps, maps)
    weights = _Blob()
    lists: list[int] = [0]
    fields = [_encode(step, maps, weights, lists) for step in steps]
    described = [getattr(one, name) for one in maps for name in MAP_FIELDS]
    lists_at = len(HEADER) + len(described) + len(STEP_FIELDS) * len(steps)
    header = [VERSION, len(maps), len(steps), lists_at]
    code = header + described + [number for field in fields for number in field] + lists
    return Program(torch.tensor(code, dtype=torch.int64, device="cpu"), weights.tensor(), steps, maps, shape)


def _size_changes(steps: list[Step]) -> list[int]:
    """Six numbers for every layer on the way to the output that changes a map's size: see `plan_output_size`."""
    maker = {step.target: step for step in steps}
    windows: list[int] = []
    at = steps[-1].source
    while (layer := maker[at].layer) is not None:
        kernel, step = layer.kernel, maker[at]
        rows: list[int] = []
        follow = step.source
        if layer.kind in ("mean_pool", "adaptive_max_pool", "adaptive_avg_pool"):
            rows = [0, kernel[0], 0, 0, kernel[1], 0]
        elif layer.kind in ("nearest", "bilinear", "pixel_shuffle"):
            if step.residual >= 0:
                follow = step.residual
            else:
                rows = [-kernel[0], 1, 0, -kernel[1], 1, 0]
        else:
            extent = [d * (k - 1) + 1 for k, d in zip(kernel, layer.dilation, strict=True)]
            padding = [layer.padding[0] + layer.padding[2], layer.padding[1] + layer.padding[3]]
            if layer.stride != (1, 1) or [e - p for e, p in zip(extent, padding, strict=True)] != [1, 1]:
                stride = [-s if layer.rounds_up else s for s in layer.stride]
                rows = [n for window in zip(extent, stride, padding, strict=True) for n in window]
        windows = rows + windows
        at = follow
    return windows


def _choose_op(layer: Layer, batch: int, choose: Choose) -> str:
    if layer.kind != "conv":
        return layer.kind
    assert layer.weight is not None
    out_channels, per_group = layer.weight.shape[:2]
    if layer.groups > 1 and per_group == 1 and out_channels == layer.groups:
        return "depthwise"
    return choose(layer, batch) if len(algorithms(layer)) > 1 else "conv"


def _zeros(count: int) -> Tensor:
    # Whatever defaults for dtype and device the user has set.
    return torch.zeros(count, dtype=torch.float32, device="cpu")


class _Blob:
    """The weights of a plan, one after another, each on a cache line."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = [_zeros(PANEL)]
        self.size = PANEL

    def add(self, *vectors: Tensor) -> int:
        start = self.size
        values = torch.cat(vectors)
        padded = _zeros(round_up(values.numel(), PANEL))
        padded[: values.numel()] = values.float()
        self.parts.append(padded)
        self.size += padded.numel()
        return start

    def tensor(self) -> Tensor:
        # A vector load of the last bias may reach past it.
        return torch.cat([*self.parts, _zeros(2 * PANEL)])


# The fields of an instruction after its op, with what they are where a layer has none.
_DEFAULTS = {
    "source": -1,
    "target": -1,
    "residual": -1,
    "act": 0,
    "kernel_h": 1,
    "kernel_w": 1,
    "stride_h": 1,
    "stride_w": 1,
    "top": 0,
    "left": 0,
    "bottom": 0,
    "right": 0,
    "dilation_h": 1,
    "dilation_w": 1,
    "weights": 0,
    "bias": 0,
    "span": 0,
    "index": 0,
    "option": 0,
    "direct": 0,
    "value": 0,
    "gate": -1,
    "before": 0,
    "before_act": 0,
}
STEP_FIELDS = ("op", *_DEFAULTS)


def _encode(step: Step, maps: list[Map], weights: _Blob, lists: list[int]) -> list[int]:
    layer = step.layer
    fields = dict(_DEFAULTS, source=step.source, target=step.target, residual=step.residual, gate=step.gate)
    if layer is not None and step.op not in ("view", "copy"):
        fields.update(_describe(step, layer, maps, weights, lists))
    # One operation of the plan, with an option.
    return [OPS.index("conv" if step.op == "bf16" else step.op), *fields.values()]


def _describe(step: Step, layer: Layer, maps: list[Map], weights: _Blob, lists: list[int]) -> dict[str, int]:
    fields: dict[str, int] = {"act": ACTS.index(layer.act), "option": _option(step.op, layer)}
    index = layer.index
    if layer.kind in ("layer_norm", "group_norm"):
        assert layer.weight is not None and layer.bias is not None
        fields["bias"] = weights.add(_panels(layer.weight), _panels(layer.bias))
        fields["span"] = layer.groups
    elif layer.weight is not None:
        packed, fields["span"], starts = _pack(step.op, layer)
        index = index or starts
        fields["weights"] = weights.add(packed)
        if step.op.startswith("winograd"):
            # For images with a NaN or an infinity, which Winograd's transforms would spread.
            fields["direct"] = weights.add(pack_panels(layer.weight))
        bias = layer.bias if layer.bias is not None else _zeros(layer.weight.shape[0])
        fields["bias"] = weights.add(_panels(bias))
        target = maps[step.target]
        step.macs = layer.weight.numel() * target.height * target.width
        step.weight_bytes = 4 * packed.numel()
    elif layer.bias is not None:
        fields["bias"] = weights.add(_panels(layer.bias))
    if index:
        fields["index"] = len(lists)
        lists += [len(index), *index]
    number = layer.value
    if layer.kind in ("layer_norm", "group_norm"):
        number = layer.epsilon
    fields["value"] = struct.unpack("<I", struct.pack("<f", number))[0]
    if layer.before is not None:
        scale, shift, act = layer.before
        fields["before"] = weights.add(_panels(scale), _panels(shift))
        fields["before_act"] = ACTS.index(act)
    for name in ("kernel", "stride", "dilation"):
        fields[f"{name}_h"], fields[f"{name}_w"] = getattr(layer, name)
    fields.update(zip(("top", "left", "bottom", "right"), layer.padding, strict=True))
    return fields


def _option(op: str, layer: Layer) -> int:
    """The number that distinguishes variants of an operation in the encoding (csrc/cpu/plan.h)."""
    if layer.kind == "conv":
        assert layer.weight is not None
        return 2 if op == "bf16" else int(op == "conv" and has_groups_of_8(layer.weight, layer.groups))
    if layer.kind == "subsample":
        return layer.offset
    return 2 * layer.rounds_up + (layer.counts_padding or layer.aligns_corners)


def _panels(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.numel() % PANEL))


def _pack(op: str, layer: Layer) -> tuple[Tensor, int, list[int]]:
    assert layer.weight is not None
    if op == "bf16":
        return pack_bf16(layer.weight), layer.weight.shape[1], []
    if op == "depthwise":
        return pack_depthwise(layer.weight), 1, []
    if op in ("winograd2", "winograd4"):
        return pack_winograd(layer.weight, int(op[-1])), layer.weight.shape[1], []
    if has_groups_of_8(layer.weight, layer.groups):
        return pack_groups_of_8(layer.weight), 8, []
    if layer.groups > 1:
        return pack_grouped(layer.weight, layer.groups)
    return pack_panels(layer.weight), layer.weight.shape[1], []
