"""Reads the layers that a plan can run off the nodes of a traced graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gatedconv.engine.idioms import resize_like, shuffle_channels, slice_channels
from gatedconv.engine.layers import (
    Layer,
    is_channels_last,
    is_map,
    is_stored,
    is_vector,
    larger_shape_of,
    map_size,
    shape_of,
)
from gatedconv.engine.lower import ConstantMaps, is_plain
from gatedconv.engine.read_arithmetic import (
    Call,
    double,
    make_layer,
    read_act,
    read_binary,
    read_call_conv,
    read_call_gelu,
    read_call_hardtanh,
    read_call_layer_norm,
    read_call_linear,
    read_call_norm,
    read_channel_bias,
    read_constant_right,
    read_conv,
    read_gelu,
    read_group_norm,
    read_hardtanh,
    read_layer_norm,
    read_linear,
    read_norm,
    read_prelu,
    source_of,
)
from gatedconv.engine.read_pool import (
    read_adaptive_max_pool,
    read_adaptive_pool,
    read_avg_pool,
    read_call_avg_pool,
    read_call_max_pool,
    read_max_pool,
    read_mean,
    read_window,
)
from gatedconv.nn import ChannelBias, Conv2d, GatherChannels, PadShortcut, ScatterAdd, ScatterChannels


def _scatter_add(node: fx.Node, module: ScatterAdd) -> Layer | None:
    stream, part = source_of(node), node.args[1]
    if not isinstance(part, fx.Node) or not _along_channels(part, module.axis) or shape_of(stream) != shape_of(node):
        return None
    index = [int(i) for i in module.index]
    if sorted(set(index)) != index:
        return None
    return Layer("scatter_add", str(node.target), [part], node, residual=stream, index=index)


def _scatter(node: fx.Node, module: ScatterChannels) -> Layer | None:
    """Channels among constants: a sum with no stream to add to."""
    index = [int(i) for i in module.index]
    if not _along_channels(node.args[0], module.axis) or len(set(index)) != len(index):
        return None
    fill = module.fill.detach().double().flatten()
    if fill.numel() != module.fill.shape[module.axis]:
        return None
    fill[index] = 0
    return make_layer("scatter_add", node, index=index, bias=fill)


def _gather(node: fx.Node, module: GatherChannels) -> Layer | None:
    if not _along_channels(node.args[0], module.axis):
        return None
    return make_layer("gather", node, index=[int(i) for i in module.index])


def _along_channels(node: Any, axis: int) -> bool:
    """Whether a node's value is stored with its channels along `axis`."""
    if not is_stored(node):
        return False
    rank = len(node.meta["tensor_meta"].shape)
    return axis % rank == (3 if is_channels_last(node) else 1)


def _shuffled(node: fx.Node, groups: int) -> Layer | None:
    if not is_map(node.args[0]):
        return None
    return make_layer(
        "gather", node, index=torch.arange(map_size(source_of(node))[0]).view(groups, -1).t().reshape(-1).tolist()
    )


def _cat(call: Call) -> Layer | None:
    nodes, node = call.get(0, "tensors"), call.node
    if not isinstance(nodes, (list, tuple)) or not all(isinstance(one, fx.Node) for one in nodes):
        return None
    if call.get(1, "dim", 0) not in (1, 1 - len(shape_of(node) or ())) or not all(
        is_map(n) or is_vector(n) for n in nodes
    ):
        return None
    return Layer("cat", node.name, list(nodes), node)


def _slice(call: Call) -> Layer | None:
    return make_layer("slice", call.node, option=int(call.get(1, "start"))) if is_map(call.node.args[0]) else None


def _subsample(node: fx.Node, module: PadShortcut) -> Layer:
    return make_layer("subsample", node, stride=(module.stride, module.stride), option=module.front)


def _fill(node: fx.Node, module: ConstantMaps) -> Layer | None:
    layer = read_window("fill", node, module.kernel_size, module.stride, module.padding)
    if layer is not None:
        layer.dilation, layer.bias = module.dilation, double(module.value)
    return layer


def _pad(node: fx.Node, sides: Any) -> Layer | None:
    """Zeros around a map."""
    if not isinstance(sides, (tuple, list)) or not is_map(node.args[0]):
        return None
    whole = [*sides, *[0] * (4 - len(sides))]
    if len(whole) != 4 or not all(isinstance(side, int) and side >= 0 for side in whole):
        return None
    left, right, top, bottom = whole
    return make_layer("pad", node, padding=(top, left, bottom, right))


def _call_pad(call: Call) -> Layer | None:
    zeros = call.get(2, "mode", "constant") == "constant" and call.get(3, "value") in (None, 0)
    return _pad(call.node, call.get(1, "pad")) if zeros else None


def _resample(node: fx.Node, factor: Any, mode: Any, corners: Any) -> Layer | None:
    if not is_map(node.args[0]) or not isinstance(factor, (int, float, tuple, list)):
        return None
    sides = (factor, factor) if isinstance(factor, (int, float)) else tuple(factor)
    if mode not in ("nearest", "bilinear") or len(sides) != 2 or any(s != int(s) or s < 1 for s in sides):
        return None
    return make_layer(mode, node, kernel=(int(sides[0]), int(sides[1])), option=int(bool(corners)))


def _upsample(node: fx.Node, module: nn.Upsample) -> Layer | None:
    if module.size is not None or module.recompute_scale_factor:
        return None
    return _resample(node, module.scale_factor, module.mode, module.align_corners)


def _interpolate(call: Call) -> Layer | None:
    if call.get(1, "size") is not None or call.get(5, "recompute_scale_factor") or call.get(6, "antialias"):
        return None
    return _resample(
        call.node, call.get(2, "scale_factor"), call.get(3, "mode", "nearest"), call.get(4, "align_corners")
    )


def _resize_like(call: Call) -> Layer | None:
    source, reference, mode, corners = call.node.args
    if mode not in ("nearest", "bilinear") or not is_map(source) or not is_map(reference):
        return None
    return make_layer(str(mode), call.node, residual=reference, option=int(bool(corners)))


def _pixel_shuffle(node: fx.Node, factor: Any) -> Layer | None:
    return make_layer("pixel_shuffle", node, kernel=(factor, factor)) if is_map(node.args[0]) else None


def _softmax(node: fx.Node, dim: Any) -> Layer | None:
    shape = shape_of(node.args[0]) or ()
    return make_layer("softmax", node) if is_stored(node.args[0]) and dim in (1, 1 - len(shape)) else None


def _flatten(node: fx.Node, start: Any, end: Any) -> Layer | None:
    """A map of one pixel becomes a vector: nothing to compute. A larger one may only be read by linear layers."""
    source = source_of(node)
    # With another reader of the map, a write to either, in place, would be seen in the other.
    if not is_vector(node) or not (is_map(source) or is_vector(source)) or len(source.users) > 1:
        return None
    if start != 1 or end not in (-1, len(shape_of(source) or ()) - 1):
        return None
    size = map_size(source)
    if "flattened" in source.meta:
        return None
    if size[1:] != (1, 1):
        if any(user.op != "call_module" for user in node.users):
            return None
        node.meta["flattened"] = size
    elif (larger_shape_of(source) or (1, 1))[-2:] != (1, 1):
        return None  # one pixel at the example's size alone
    return make_layer("alias", node)


def _permute(node: fx.Node, dims: Any) -> Layer | None:
    source = source_of(node)
    order = tuple(int(d) % 4 for d in dims)
    if len(source.users) > 1 and not is_channels_last(source) and _written_in_place(source, node):
        return None
    if order == (0, 2, 3, 1) and is_map(source):
        node.meta["channels_last"] = node.meta["permuted"] = True
    elif order == (0, 3, 1, 2) and is_channels_last(source):
        node.meta["permuted"] = True
    else:
        return None
    return make_layer("alias", node)


def _written_in_place(source: fx.Node, but: fx.Node) -> bool:
    return any(str(user.target).endswith("_") or user.kwargs.get("inplace") for user in source.users if user is not but)


def _call_permute(call: Call) -> Layer | None:
    dims = call.node.args[1] if isinstance(call.node.args[1], (tuple, list)) else call.node.args[1:]
    return _permute(call.node, dims) if len(dims) == 4 else None


def _contiguous(call: Call) -> Layer | None:
    return make_layer("alias", call.node) if len(source_of(call.node).users) == 1 and not call.node.kwargs else None


def _of_call(read: Callable[..., Layer | None], *arguments: tuple[int, str, Any]) -> Callable[[Call], Layer | None]:
    """A reader of calls from one that takes the node and some of its arguments."""
    return lambda call: read(call.node, *(call.get(*argument) for argument in arguments))


_RELU, _CALL_RELU = read_act("relu")
_RELU6, _CALL_RELU6 = read_act("relu6")
_LEAKY, _CALL_LEAKY = read_act("leaky_relu", "negative_slope", 0.01)
_ELU, _CALL_ELU = read_act("elu", "alpha", 1.0)
_SILU, _CALL_SILU = read_act("silu")
_HARD_SWISH, _CALL_HARD_SWISH = read_act("hard_swish")
_HARD_SIGMOID, _CALL_HARD_SIGMOID = read_act("hard_sigmoid")
_SIGMOID, _CALL_SIGMOID = read_act("sigmoid")
_TANH, _CALL_TANH = read_act("tanh")
_MISH, _CALL_MISH = read_act("mish")
_PLUS = read_binary("add", torch.ones_like, lambda c: c)
_TIMES = read_binary("multiply", lambda c: c, torch.zeros_like)
_MINUS = read_constant_right(torch.ones_like, lambda c: -c)
_OVER = read_constant_right(lambda c: 1 / c, torch.zeros_like)

_MODULES: dict[type[nn.Module], Callable[..., Layer | None]] = {
    nn.Conv2d: read_conv,
    Conv2d: read_conv,
    nn.Linear: read_linear,
    nn.BatchNorm2d: read_norm,
    nn.LayerNorm: read_layer_norm,
    nn.GroupNorm: read_group_norm,
    nn.ReLU: _RELU,
    nn.ReLU6: _RELU6,
    nn.Hardtanh: read_hardtanh,
    nn.LeakyReLU: _LEAKY,
    nn.PReLU: read_prelu,
    nn.ELU: _ELU,
    nn.SiLU: _SILU,
    nn.Hardswish: _HARD_SWISH,
    nn.Hardsigmoid: _HARD_SIGMOID,
    nn.Sigmoid: _SIGMOID,
    nn.Tanh: _TANH,
    nn.GELU: read_gelu,
    nn.Mish: _MISH,
    nn.Softmax: lambda node, module: _softmax(node, module.dim),
    nn.Softmax2d: lambda node, module: _softmax(node, 1),
    nn.MaxPool2d: read_max_pool,
    nn.AvgPool2d: read_avg_pool,
    nn.AdaptiveAvgPool2d: lambda node, pool: read_adaptive_pool("avg", node, pool.output_size),
    nn.AdaptiveMaxPool2d: read_adaptive_max_pool,
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    nn.PixelShuffle: lambda node, module: _pixel_shuffle(node, module.upscale_factor),
    nn.ChannelShuffle: lambda node, module: _shuffled(node, module.groups),
    nn.ZeroPad2d: lambda node, module: _pad(node, module.padding),
    nn.Flatten: lambda node, module: _flatten(node, module.start_dim, module.end_dim),
    ChannelBias: read_channel_bias,
    ConstantMaps: _fill,
    GatherChannels: _gather,
    PadShortcut: _subsample,
    ScatterAdd: _scatter_add,
    ScatterChannels: _scatter,
}

_FUNCTIONS: dict[Any, Callable[[Call], Layer | None]] = {
    operator.add: _PLUS,
    operator.iadd: _PLUS,
    torch.add: _PLUS,
    operator.mul: _TIMES,
    operator.imul: _TIMES,
    torch.mul: _TIMES,
    operator.sub: _MINUS,
    operator.isub: _MINUS,
    operator.truediv: _OVER,
    operator.itruediv: _OVER,
    torch.relu: _CALL_RELU,
    torch.relu_: _CALL_RELU,
    F.relu: _CALL_RELU,
    F.relu6: _CALL_RELU6,
    F.hardtanh: read_call_hardtanh,
    F.leaky_relu: _CALL_LEAKY,
    F.elu: _CALL_ELU,
    F.silu: _CALL_SILU,
    F.hardswish: _CALL_HARD_SWISH,
    F.hardsigmoid: _CALL_HARD_SIGMOID,
    F.sigmoid: _CALL_SIGMOID,
    torch.sigmoid: _CALL_SIGMOID,
    F.tanh: _CALL_TANH,
    torch.tanh: _CALL_TANH,
    F.gelu: read_call_gelu,
    F.mish: _CALL_MISH,
    F.softmax: _of_call(_softmax, (1, "dim", None)),
    torch.softmax: _of_call(_softmax, (1, "dim", None)),
    F.conv2d: read_call_conv,
    F.linear: read_call_linear,
    F.batch_norm: read_call_norm,
    F.layer_norm: read_call_layer_norm,
    F.pad: _call_pad,
    torch.flatten: _of_call(_flatten, (1, "start_dim", 0), (2, "end_dim", -1)),
    torch.permute: _call_permute,
    torch.mean: read_mean,
    torch.cat: _cat,
    torch.concat: _cat,
    slice_channels: _slice,
    shuffle_channels: _of_call(_shuffled, (1, "groups", 1)),
    resize_like: _resize_like,
    F.interpolate: _interpolate,
    F.pixel_shuffle: _of_call(_pixel_shuffle, (1, "upscale_factor", 1)),
    F.channel_shuffle: _of_call(_shuffled, (1, "groups", 1)),
    F.max_pool2d: read_call_max_pool,
    F.avg_pool2d: read_call_avg_pool,
    F.adaptive_avg_pool2d: lambda call: read_adaptive_pool("avg", call.node, call.get(1, "output_size")),
}

_METHODS: dict[str, Callable[[Call], Layer | None]] = {
    "add": _PLUS,
    "add_": _PLUS,
    "mul": _TIMES,
    "mul_": _TIMES,
    "relu": _CALL_RELU,
    "relu_": _CALL_RELU,
    "sigmoid": _CALL_SIGMOID,
    "tanh": _CALL_TANH,
    "softmax": _of_call(_softmax, (1, "dim", None)),
    "flatten": _of_call(_flatten, (1, "start_dim", 0), (2, "end_dim", -1)),
    "permute": _call_permute,
    "contiguous": _contiguous,
    "mean": read_mean,
}


# What may read and make maps whose axes are permuted: each pixel by itself.
_BY_PIXEL = {"act", "affine", "add", "multiply", "layer_norm", "alias", "conv", "gather", "scatter_add"}


def read_layer(node: fx.Node, model: nn.Module) -> Layer | None:
    """Return the layer that computes a node, None if no plan can.

    Shapes must have been found with a batch of two images, so that a broadcast shows. Nodes have to be read in the
    order of the graph: those that permute the axes are marked.
    """
    if not node.args or shape_of(node) is None:
        return None
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        # A subclass may compute something else: only types that are known are read.
        known = type(module) in _MODULES and (type(module) is not Conv2d or module.gate is None)
        layer = _MODULES[type(module)](node, module) if known and is_plain(module) else None
    elif node.op == "call_function":
        reader = _FUNCTIONS.get(node.target)
        layer = reader(Call(node, model)) if reader is not None else None
    elif node.op == "call_method":
        reader = _METHODS.get(str(node.target))
        layer = reader(Call(node, model)) if reader is not None else None
    else:
        layer = None
    if layer is None or (layer.kind != "conv" and any("flattened" in one.meta for one in layer.inputs)):
        return None  # only a linear layer knows a vector that is stored as the map it was
    last = [is_channels_last(i) for i in layer.inputs]
    if any(last) and layer.kind in _BY_PIXEL and "permuted" not in node.meta:
        node.meta["channels_last"] = True
    elif any(last) and "permuted" not in node.meta:
        return None
    reads = [*layer.inputs, *([layer.residual] if layer.residual is not None else [])]
    stored = all(is_stored(one) for one in (*reads, node))
    return layer if stored and len({is_channels_last(one) for one in reads}) == 1 else None
