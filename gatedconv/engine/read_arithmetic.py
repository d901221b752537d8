"""Readers of what computes: convolutions, linear layers, norms, activations, sums and products."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.engine.idioms import argument_of
from gatedconv.engine.layers import Layer, Pair, is_map, is_nhwc, is_stored, is_vector, map_size, shape_of, size_of


class Call:
    """A call of an operation: its arguments, of which trailing ones that are the default may lack."""

    def __init__(self, node: fx.Node, model: nn.Module) -> None:
        self.node, self.model = node, model
        self.source = node.args[0]

    def get(self, at: int, name: str = "", default: Any = None) -> Any:
        """Return the argument at a position or of a name."""
        return argument_of(self.node, at, name, default)

    def constant(self, value: Any) -> Tensor | None:
        """A parameter or buffer of the model, or a number; None for what is computed."""
        if isinstance(value, (bool, int, float)):
            return torch.tensor(float(value), dtype=torch.float64, device="cpu")
        if isinstance(value, fx.Node) and value.op == "get_attr":
            found = attrgetter(str(value.target))(self.model)
            # A number of the model's code is a tensor without dimensions, whatever its type.
            real = found.dtype == torch.float32 or (found.dim() == 0 and not found.is_complex())
            return found.detach().double() if real else None
        return None

    def constants(self, *at: int) -> list[Tensor | None] | None:
        """The values of arguments that are constants or None; None if one is computed."""
        given = [self.get(one) for one in at]
        found = [None if value is None else self.constant(value) for value in given]
        computed = any(value is not None and one is None for value, one in zip(given, found, strict=True))
        return None if computed else found


def source_of(node: fx.Node) -> fx.Node:
    """Return the first argument, which must be a node."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def pair(value: Any) -> Pair:
    """Return height and width of a number for both or a sequence."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def double(value: Tensor | None) -> Tensor | None:
    """Return a float64 copy."""
    return None if value is None else value.detach().double().clone()


def name_of_layer(node: fx.Node) -> str:
    """The path of the module without children in whose forward a node ran; else the node's name."""
    return str(node.meta.get("path", node.name))


def make_layer(kind: str, node: fx.Node, **fields: Any) -> Layer:
    """Return a layer of a node that reads its first argument."""
    return Layer(kind, name_of_layer(node), [source_of(node)], node, **fields)


def read_conv(call: Call) -> Layer | None:
    """Read a convolution with constant weights."""
    constants = call.constants(1, 2)
    stride, padding, dilation, transposed, _, groups = call.node.args[3:]
    weight, bias = constants or (None, None)
    if weight is None or transposed or not is_map(call.source):
        return None
    (top, left), kernel = pair(padding), pair(tuple(weight.shape[2:]))
    window = {"stride": pair(stride), "padding": (top, left, top, left), "dilation": pair(dilation), "groups": groups}
    return make_layer("conv", call.node, kernel=kernel, weight=weight, bias=bias, **window)


def read_linear(node: fx.Node, linear: nn.Linear) -> Layer | None:
    """Read a linear layer over vectors, over the channels of every pixel, or over a flattened map."""
    if linear.weight.dtype != torch.float32:
        return None
    return _make_linear(node, linear.weight.detach().double(), double(linear.bias))


def read_product(call: Call) -> Layer | None:
    """Read a product of each pixel's channels, or of vectors, with a constant matrix (C, K)."""
    weight, bias = call.constants(1, 2) or (None, None)
    if weight is None or (bias is not None and bias.shape != weight.shape[1:]):
        return None
    return _make_linear(call.node, weight.t().contiguous(), bias)


def _make_linear(node: fx.Node, weight: Tensor, bias: Tensor | None) -> Layer | None:
    source = source_of(node)
    if not (is_vector(source) or is_nhwc(source)):
        return None
    size = source.meta.get("flattened")  # of the map that was flattened: a convolution as large as the map
    if size is not None:
        return make_layer("conv", node, kernel=size[1:], weight=weight.view(-1, *size), bias=bias)
    return make_layer("conv", node, weight=weight[:, :, None, None], bias=bias)


def read_norm(call: Call) -> Layer | None:
    """Read a batch norm with constant statistics."""
    weight, bias, mean, var = call.constants(1, 2, 3, 4) or (None,) * 4
    if mean is None or var is None or call.get(5) is not False:
        return None
    if not is_stored(call.source) or is_nhwc(source_of(call.node)):
        return None
    scale = torch.rsqrt(var + call.get(7))
    scale = scale if weight is None else scale * weight
    return make_layer("affine", call.node, weight=scale, bias=-mean * scale if bias is None else bias - mean * scale)


def _over_channels(node: fx.Node, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    channels = map_size(node)[0]
    ones = torch.ones(channels, dtype=torch.float64, device="cpu")
    return (ones if weight is None else weight.clone(), 0 * ones if bias is None else bias.clone())


def read_layer_norm(call: Call) -> Layer | None:
    """Read a layer norm over channels, with constant weights."""
    source, constants = source_of(call.node), call.constants(2, 3)
    if constants is None or not (is_nhwc(source) or is_vector(source)):
        return None
    if list(call.get(1)) != [map_size(source)[0]]:
        return None
    scale, shift = _over_channels(source, *constants)
    return make_layer("layer_norm", call.node, weight=scale, bias=shift, epsilon=call.get(4))


def read_group_norm(call: Call) -> Layer | None:
    """Read a group norm with constant weights."""
    constants = call.constants(2, 3)
    if constants is None or not is_map(call.source):
        return None
    scale, shift = _over_channels(source_of(call.node), *constants)
    return make_layer("group_norm", call.node, groups=call.get(1), weight=scale, bias=shift, epsilon=call.get(4))


def read_act(act: str, default: float = 0.0) -> Callable[[Call], Layer | None]:
    """Reader of an activation, and of its number where it has one."""

    def read(call: Call) -> Layer | None:
        if len(call.node.args) > 2:  # an ELU that is scaled
            return None
        return make_layer("act", call.node, act=act, value=float(call.get(1, default=default)))

    return read


def read_hardtanh(call: Call) -> Layer | None:
    """Read a hardtanh, or a clamp, that is a ReLU6."""
    return make_layer("act", call.node, act="relu6") if call.node.args[1:] == (0, 6) else None


def read_gelu(call: Call) -> Layer | None:
    """Read a GELU."""
    act = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(call.node.kwargs.get("approximate", "none")))
    return make_layer("act", call.node, act=act) if act else None


def read_prelu(call: Call) -> Layer | None:
    """Read a PReLU with constant slopes: one, or one for each channel."""
    slopes = call.constant(call.get(1))
    if slopes is None or not (is_map(call.source) or is_vector(call.source)):
        return None
    return make_layer("prelu", call.node, bias=slopes.flatten().expand(map_size(source_of(call.node))[0]).clone())


def read_binary(kind: str, scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Reader of a sum or product of two maps, one of which may be a broadcast; or of a map and a constant.

    With the constant c the layer is x * scale(c) + shift(c).
    """

    def read(call: Call) -> Layer | None:
        node = call.node
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        for one, other in ((left, right), (right, left)):
            value = call.constant(other)
            if value is not None and isinstance(one, fx.Node) and shape_of(one) == shape_of(node):
                channels = _per_channel(value, one)
                if channels is None:
                    return None
                return Layer("affine", name_of_layer(node), [one], node, weight=scale(channels), bias=shift(channels))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        if _broadcasts(left, right):
            return Layer(kind, name_of_layer(node), [left], node, residual=right)
        return Layer(kind, name_of_layer(node), [right], node, residual=left) if _broadcasts(right, left) else None

    return read


def _per_channel(value: Tensor, node: fx.Node) -> Tensor | None:
    """A constant as a vector over the channels of a node's value, None if it differs between pixels."""
    channels = map_size(node)[0] if is_stored(node) else 0
    axis = 1 if is_vector(node) or is_nhwc(node) else 3  # of the channels, from the end
    shape = [1] * (axis - value.dim()) + list(value.shape)
    at = len(shape) - axis
    if any(length != 1 for i, length in enumerate(shape) if i != at) or shape[at] not in (1, channels):
        return None
    return value.reshape(-1).expand(channels).clone()


def _broadcasts(large: fx.Node, small: fx.Node) -> bool:
    """Whether `small` has the size of `large`, or one pixel, or one channel, whatever the size of the images."""
    for shapes in ((shape_of(large), shape_of(small)), (size_of(large, larger=True), size_of(small, larger=True))):
        if not shapes[0] or not shapes[1]:  # unknown, or a number
            if shapes != (None, None):
                return False
            continue
        (n, *size), other = shapes[0], shapes[1]
        if len(size) == 3 and not is_nhwc(large):
            fits = [tuple(size), (size[0], 1, 1), (1, size[1], size[2])]
        else:
            fits = [tuple(size)]
        if other[:1] != (n,) or other[1:] not in fits:
            return False
    if size_of(large, larger=True) is None:
        return True
    same = shape_of(large) == shape_of(small), size_of(large, larger=True) == size_of(small, larger=True)
    return same[0] == same[1]  # equal at the example's size alone, a broadcast at others


def read_constant_right(scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Reader of x - c and x / c."""

    def read(call: Call) -> Layer | None:
        source, value = call.node.args[0], call.constant(call.get(1, "other"))
        if len(call.node.args) != 2 or call.node.kwargs or value is None or not isinstance(source, fx.Node):
            return None
        channels = _per_channel(value, source) if shape_of(source) == shape_of(call.node) else None
        if channels is None:
            return None
        return make_layer("affine", call.node, weight=scale(channels), bias=shift(channels))

    return read
