"""Reads the layers that a plan can run off the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from gatedconv.engine.idioms import (
    adaptive_maximum,
    as_pixels,
    multiply_channels,
    operation_of,
    resize_like,
    shuffle_channels,
    slice_channels,
)
from gatedconv.engine.layers import Layer, is_map, is_nhwc, is_stored, is_vector, map_size, shape_of, size_of
from gatedconv.engine.lower import ConstantMaps
from gatedconv.engine.read_arithmetic import (
    Call,
    double,
    make_layer,
    name_of_layer,
    read_act,
    read_binary,
    read_constant_right,
    read_conv,
    read_gelu,
    read_group_norm,
    read_hardtanh,
    read_layer_norm,
    read_linear,
    read_norm,
    read_prelu,
    read_product,
    source_of,
)
from gatedconv.engine.read_pool import read_adaptive_pool, read_avg_pool, read_max_pool, read_mean, read_window
from gatedconv.nn import GatherChannels, PadShortcut, ScatterAdd, ScatterChannels

aten = torch.ops.aten


def _scatter_add(node: fx.Node, module: ScatterAdd) -> Layer | None:
    stream, part = source_of(node), node.args[1]
    if not isinstance(part, fx.Node) or not _along_channels(part, module.axis) or shape_of(stream) != shape_of(node):
        return None
    index = [int(i) for i in module.index]
    if sorted(set(index)) != index:
        return None
    return Layer("scatter_add", name_of_layer(node), [part], node, residual=stream, index=index)


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
    return axis % rank == (3 if is_nhwc(node) else 1)


def _shuffled(call: Call) -> Layer | None:
    if not is_map(call.source):
        return None
    order = torch.arange(map_size(source_of(call.node))[0], device="cpu").view(call.get(1), -1).t().reshape(-1)
    return make_layer("gather", call.node, index=order.tolist())


def _cat(call: Call) -> Layer | None:
    node, nodes = call.node, cast(list[fx.Node], call.source)
    if not isinstance(nodes, (list, tuple)) or not all(is_map(n) or is_vector(n) for n in nodes):
        return None
    along_channels = call.get(1, "dim", 0) in (1, 1 - len(shape_of(node) or ()))
    return Layer("cat", name_of_layer(node), list(nodes), node) if along_channels else None


def _slice(call: Call) -> Layer | None:
    return make_layer("slice", call.node, offset=int(call.get(1))) if is_map(call.source) else None


def _subsample(node: fx.Node, module: PadShortcut) -> Layer:
    return make_layer("subsample", node, stride=(module.stride, module.stride), offset=module.front)


def _fill(node: fx.Node, module: ConstantMaps) -> Layer | None:
    layer = read_window("fill", node, module.kernel_size, module.stride, module.padding)
    if layer is not None:
        layer.dilation, layer.bias = module.dilation, double(module.value)
    return layer


def _pad(call: Call) -> Layer | None:
    """Zeros around a map."""
    whole = [*call.get(1), *[0] * (4 - len(call.get(1)))]
    if call.get(2, default=0) != 0 or not is_map(call.source) or len(whole) != 4 or min(whole) < 0:
        return None
    left, right, top, bottom = whole
    if not any(whole):
        return _same(call)
    return make_layer("pad", call.node, padding=(top, left, bottom, right))


def _interpolate(mode: str) -> Callable[[Call], Layer | None]:
    """Reader of an interpolation by factors; to sizes alone it stays in PyTorch."""

    def read(call: Call) -> Layer | None:
        args: Any = call.node.args
        if len(args) < 3 or args[1] is not None or not is_map(call.source):
            return None
        _, _, *corners, factors = args
        if not all(factor == int(factor) >= 1 for factor in factors):
            return None
        return make_layer(mode, call.node, kernel=(int(factors[0]), int(factors[1])), aligns_corners=any(corners))

    return read


def _resize_like(call: Call) -> Layer | None:
    source, reference, mode, corners = call.node.args
    if not is_map(source) or not is_map(reference):
        return None
    return make_layer(str(mode), call.node, residual=reference, aligns_corners=bool(corners))


def _pixel_shuffle(call: Call) -> Layer | None:
    return make_layer("pixel_shuffle", call.node, kernel=(call.get(1), call.get(1))) if is_map(call.source) else None


def _softmax(call: Call) -> Layer | None:
    over_channels = call.get(1) in (1, 1 - len(shape_of(call.source) or ()))
    return make_layer("softmax", call.node) if is_stored(call.source) and over_channels else None


def _flatten(call: Call) -> Layer | None:
    """A map of one pixel becomes a vector: nothing to compute. A larger one may only be read by linear layers."""
    node, source = call.node, source_of(call.node)
    if not is_map(source):
        return None
    size = map_size(source)
    if size[1:] != (1, 1):
        if any(user.op != "call_module" and user.target is not multiply_channels for user in node.users):
            return None
        node.meta["flattened"] = size
    elif (size_of(source, larger=True) or (1, 1))[-2:] != (1, 1):
        return None  # one pixel at the example's size alone
    return make_layer("alias", node)


def _permute(call: Call) -> Layer | None:
    node, source = call.node, source_of(call.node)
    order = tuple(int(d) % 4 for d in call.get(1))
    if order == (0, 2, 3, 1) and is_map(source):
        node.meta["nhwc"] = node.meta["permuted"] = True
    elif order == (0, 3, 1, 2) and is_nhwc(source):
        node.meta["permuted"] = True
    else:
        return None
    return make_layer("alias", node)


def _same(call: Call) -> Layer:
    """A copy or a view of the same numbers."""
    return make_layer("alias", call.node)


_MODULES: dict[type[nn.Module], Callable[..., Layer | None]] = {
    nn.Linear: read_linear,
    ConstantMaps: _fill,
    GatherChannels: _gather,
    PadShortcut: _subsample,
    ScatterAdd: _scatter_add,
    ScatterChannels: _scatter,
}

_FUNCTIONS: dict[Any, Callable[[Call], Layer | None]] = {
    aten.add: read_binary("add", torch.ones_like, lambda c: c),
    aten.mul: read_binary("multiply", lambda c: c, torch.zeros_like),
    aten.sub: read_constant_right(torch.ones_like, lambda c: -c),
    aten.div: read_constant_right(lambda c: 1 / c, torch.zeros_like),
    aten.relu: read_act("relu"),
    aten.hardtanh: read_hardtanh,
    aten.clamp: read_hardtanh,
    aten.leaky_relu: read_act("leaky_relu", 0.01),
    aten._prelu_kernel: read_prelu,
    aten.elu: read_act("elu", 1.0),
    aten.silu: read_act("silu"),
    aten.hardswish: read_act("hard_swish"),
    aten.hardsigmoid: read_act("hard_sigmoid"),
    aten.sigmoid: read_act("sigmoid"),
    aten.tanh: read_act("tanh"),
    aten.gelu: read_gelu,
    aten.mish: read_act("mish"),
    aten._softmax: _softmax,
    aten.convolution: read_conv,
    multiply_channels: read_product,
    aten.batch_norm: read_norm,
    aten.layer_norm: read_layer_norm,
    aten.group_norm: read_group_norm,
    aten.max_pool2d: read_max_pool,
    aten.avg_pool2d: read_avg_pool,
    aten._adaptive_avg_pool2d: read_adaptive_pool("avg"),
    adaptive_maximum: read_adaptive_pool("max"),
    aten.mean: read_mean,
    aten.upsample_nearest2d: _interpolate("nearest"),
    aten.upsample_bilinear2d: _interpolate("bilinear"),
    resize_like: _resize_like,
    aten.constant_pad_nd: _pad,
    aten.pixel_shuffle: _pixel_shuffle,
    aten.channel_shuffle: _shuffled,
    shuffle_channels: _shuffled,
    aten.cat: _cat,
    slice_channels: _slice,
    aten.permute: _permute,
    aten.flatten: _flatten,
    as_pixels: _same,
    aten.clone: _same,
    aten.detach: _same,
    aten.alias: _same,
}
"""Readers by operation, of whatever overload, and by idiom."""

# What may read and make maps whose axes are permuted: each pixel by itself.
_BY_PIXEL = {"act", "affine", "add", "multiply", "layer_norm", "alias", "conv", "gather", "scatter_add"}


def read_layer(node: fx.Node, model: nn.Module) -> Layer | None:
    """Return the layer that computes a node, None if no plan can.

    Shapes must have been found with a batch of two images, so that a broadcast shows. Nodes have to be read in the
    order of the graph: those that permute the axes are marked.
    """
    reads, layer = node.all_input_nodes, None
    if not node.args or shape_of(node) is None or any("tensor_meta" not in read.meta for read in reads):
        return None  # of no tensor, or depending on a number
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        read_module = _MODULES.get(type(module))
        layer = read_module(node, module) if read_module is not None else None
    elif node.op == "call_function":
        read_call = _FUNCTIONS.get(operation_of(node))
        layer = read_call(Call(node, model)) if read_call is not None else None
    if layer is None or (layer.kind != "conv" and any("flattened" in one.meta for one in layer.inputs)):
        return None  # only a linear layer takes a vector that is stored as the map it was
    last = [is_nhwc(i) for i in layer.inputs]
    if any(last) and layer.kind in _BY_PIXEL and "permuted" not in node.meta:
        node.meta["nhwc"] = True
    elif any(last) and "permuted" not in node.meta:
        return None
    reads = [*layer.inputs, *([layer.residual] if layer.residual is not None else [])]
    stored = all(is_stored(one) for one in (*reads, node))
    return layer if stored and len({is_nhwc(one) for one in reads}) == 1 else None
