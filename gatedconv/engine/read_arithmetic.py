"""Readers of what computes: convolutions, linear layers, norms, activations, sums and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.engine.layers import (
    Layer,
    Pair,
    is_channels_last,
    is_map,
    is_stored,
    is_vector,
    larger_shape_of,
    map_size,
    shape_of,
)
from gatedconv.nn import ChannelBias


class Call:
    """A call of a function or method: its arguments by position or name."""

    def __init__(self, node: fx.Node, model: nn.Module) -> None:
        self.node, self.model = node, model
        self.name = node.name

    def get(self, at: int, name: str, default: Any = None) -> Any:
        """Return the argument at a position or of a name."""
        return self.node.args[at] if len(self.node.args) > at else self.node.kwargs.get(name, default)

    def constant(self, value: Any) -> Tensor | None:
        """A parameter or buffer of the model, or a number; None for what is computed."""
        if isinstance(value, (bool, int, float)):
            return torch.tensor(float(value), dtype=torch.float64, device="cpu")
        if isinstance(value, fx.Node) and value.op == "get_attr":
            found: Any = self.model
            for part in str(value.target).split("."):
                found = getattr(found, part)
            return found.detach().double() if isinstance(found, Tensor) and found.dtype == torch.float32 else None
        return None

    def constants(self, *arguments: tuple[int, str]) -> list[Tensor | None] | None:
        """The values of arguments that are constants or None; None if one is computed."""
        given = [self.get(*argument) for argument in arguments]
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


def make_layer(kind: str, node: fx.Node, **fields: Any) -> Layer:
    """Return a layer of a node that reads its first argument."""
    name = str(node.target) if node.op == "call_module" else node.name
    return Layer(kind, name, [source_of(node)], node, **fields)


def read_conv(node: fx.Node, conv: nn.Conv2d) -> Layer | None:
    """Read a convolution."""
    if conv.padding_mode != "zeros" or conv.weight.dtype != torch.float32:
        return None
    window = conv.stride, conv.padding, conv.dilation, conv.groups
    return _make_conv(node, double(conv.weight), double(conv.bias), *window)


def read_call_conv(call: Call) -> Layer | None:
    """Read a call of F.conv2d with constant weights."""
    given = [(3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1)]
    constants = call.constants((1, "weight"), (2, "bias"))
    if constants is None:
        return None
    weight, bias = constants
    return _make_conv(call.node, weight, bias, *(call.get(*one) for one in given))


def _make_conv(
    node: fx.Node, weight: Tensor | None, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Layer | None:
    if weight is None or not is_map(node.args[0]):
        return None
    kernel, dilation = pair(tuple(weight.shape[2:])), pair(dilation)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        top, left = (0, 0) if padding == "valid" else pair(padding)
        sides = (top, left, top, left)
    fields = {"stride": pair(stride), "padding": sides, "dilation": dilation, "groups": groups}
    return make_layer("conv", node, kernel=kernel, weight=weight, bias=bias, **fields)


def read_linear(node: fx.Node, linear: nn.Linear) -> Layer | None:
    """Read a linear layer over vectors, over the channels of every pixel, or over a flattened map."""
    if linear.weight.dtype != torch.float32:
        return None
    return _make_linear(node, double(linear.weight), double(linear.bias))


def read_call_linear(call: Call) -> Layer | None:
    """Read a call of F.linear with constant weights."""
    constants = call.constants((1, "weight"), (2, "bias"))
    return None if constants is None else _make_linear(call.node, *constants)


def _make_linear(node: fx.Node, weight: Tensor | None, bias: Tensor | None) -> Layer | None:
    source = source_of(node)
    if weight is None or not (is_vector(source) or is_channels_last(source)):
        return None
    size = source.meta.get("flattened")  # of the map that was flattened: a convolution as large as the map
    if size is not None:
        return make_layer("conv", node, kernel=size[1:], weight=weight.view(-1, *size), bias=bias)
    return make_layer("conv", node, weight=weight[:, :, None, None], bias=bias)


def read_norm(node: fx.Node, norm: nn.BatchNorm2d) -> Layer | None:
    """Read a batch norm with running statistics."""
    if norm.running_mean is None or norm.running_mean.dtype != torch.float32:
        return None
    numbers = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return _make_norm(node, *map(double, numbers), eps=norm.eps)


def read_call_norm(call: Call) -> Layer | None:
    """Read a call of F.batch_norm with constant statistics."""
    constants = call.constants((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
    if constants is None or call.get(5, "training", False) is not False:
        return None
    return _make_norm(call.node, *constants, eps=call.get(7, "eps", 1e-5))


def _make_norm(
    node: fx.Node, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Layer | None:
    if mean is None or var is None or not is_stored(node.args[0]) or is_channels_last(source_of(node)):
        return None
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    return make_layer("affine", node, weight=scale, bias=-mean * scale if bias is None else bias - mean * scale)


def read_channel_bias(node: fx.Node, module: ChannelBias) -> Layer:
    """Read a bias per channel."""
    bias = module.bias.detach().double().clone()
    return make_layer("affine", node, weight=torch.ones_like(bias), bias=bias)


def _over_channels(node: fx.Node, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    channels = map_size(node)[0]
    ones = torch.ones(channels, dtype=torch.float64, device="cpu")
    return (ones if weight is None else weight.double().clone(), 0 * ones if bias is None else bias.double().clone())


def read_layer_norm(node: fx.Node, norm: nn.LayerNorm) -> Layer | None:
    """Read a layer norm over channels."""
    weight, bias = (None if value is None else value.detach() for value in (norm.weight, norm.bias))
    return _make_layer_norm(node, list(norm.normalized_shape), weight, bias, eps=norm.eps)


def read_call_layer_norm(call: Call) -> Layer | None:
    """Read a call of F.layer_norm over channels."""
    constants = call.constants((2, "weight"), (3, "bias"))
    if constants is None:
        return None
    weight, bias = constants
    return _make_layer_norm(call.node, call.get(1, "normalized_shape"), weight, bias, eps=call.get(4, "eps", 1e-5))


def _make_layer_norm(
    node: fx.Node, over: Any, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Layer | None:
    source = source_of(node)
    if not (is_channels_last(source) or is_vector(source)) or list(over) != [map_size(source)[0]]:
        return None
    scale, shift = _over_channels(source, weight, bias)
    return make_layer("layer_norm", node, weight=scale, bias=shift, epsilon=eps)


def read_group_norm(node: fx.Node, norm: nn.GroupNorm) -> Layer | None:
    """Read a group norm."""
    if not is_map(node.args[0]):
        return None
    scale, shift = _over_channels(
        source_of(node), *(None if v is None else v.detach() for v in (norm.weight, norm.bias))
    )
    return make_layer("group_norm", node, groups=norm.num_groups, weight=scale, bias=shift, epsilon=norm.eps)


def read_act(act: str, parameter: str = "", default: float = 0.0) -> Any:
    """Reader of an activation; `parameter` is the module's attribute and the function's argument for its value."""

    def read(node: fx.Node, module: nn.Module) -> Layer:
        return make_layer("act", node, act=act, value=float(getattr(module, parameter)) if parameter else 0.0)

    def read_call(call: Call) -> Layer | None:
        value = call.get(1, parameter, default) if parameter else 0.0
        fine = isinstance(call.node.args[0], fx.Node) and isinstance(value, (int, float))
        return make_layer("act", call.node, act=act, value=float(value)) if fine else None

    return read, read_call


def read_hardtanh(node: fx.Node, module: nn.Hardtanh) -> Layer | None:
    """Read a hardtanh that is a ReLU6."""
    return make_layer("act", node, act="relu6") if (module.min_val, module.max_val) == (0, 6) else None


def read_call_hardtanh(call: Call) -> Layer | None:
    """Read a call of F.hardtanh that is a ReLU6."""
    fits = (call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0)) == (0, 6)
    return make_layer("act", call.node, act="relu6") if fits else None


def read_gelu(node: fx.Node, module: nn.GELU) -> Layer:
    """Read a GELU."""
    return make_layer("act", node, act="gelu_tanh" if module.approximate == "tanh" else "gelu")


def read_call_gelu(call: Call) -> Layer | None:
    """Read a call of F.gelu."""
    act = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(call.node.kwargs.get("approximate", "none")))
    return make_layer("act", call.node, act=act) if act else None


def read_prelu(node: fx.Node, module: nn.PReLU) -> Layer | None:
    """Read a PReLU, with one slope or one for each channel."""
    slopes = module.weight.detach().double().clone()
    if not (is_map(node.args[0]) or is_vector(node.args[0])) or module.weight.dtype != torch.float32:
        return None
    return make_layer("prelu", node, bias=slopes.expand(map_size(source_of(node))[0]).clone())


def read_binary(kind: str, scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Reader of a sum or product of two maps, one of which may be a broadcast; or of a map and a constant.

    With the constant c the layer is x * scale(c) + shift(c).
    """

    def read(call: Call) -> Layer | None:
        node = call.node
        if len(node.args) != 2 or set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
            return None
        left, right = node.args
        for one, other in ((left, right), (right, left)):
            value = call.constant(other)
            if value is not None and isinstance(one, fx.Node) and shape_of(one) == shape_of(node):
                channels = _per_channel(value, one)
                if channels is None:
                    return None
                return Layer("affine", call.name, [one], node, weight=scale(channels), bias=shift(channels))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        if _broadcasts(left, right):
            return Layer(kind, call.name, [left], node, residual=right)
        return Layer(kind, call.name, [right], node, residual=left) if _broadcasts(right, left) else None

    return read


def _per_channel(value: Tensor, node: fx.Node) -> Tensor | None:
    """A constant as a vector over the channels of a node's value, None if it differs between pixels."""
    channels = map_size(node)[0] if is_stored(node) else 0
    axis = 1 if is_vector(node) or is_channels_last(node) else 3  # of the channels, from the end
    shape = [1] * (axis - value.dim()) + list(value.shape)
    at = len(shape) - axis
    if any(length != 1 for i, length in enumerate(shape) if i != at) or shape[at] not in (1, channels):
        return None
    return value.reshape(-1).expand(channels).clone()


def _broadcasts(large: fx.Node, small: fx.Node) -> bool:
    """Whether `small` has the size of `large`, or one pixel, or one channel, whatever the size of the images."""
    for shapes in ((shape_of(large), shape_of(small)), (larger_shape_of(large), larger_shape_of(small))):
        if not shapes[0] or not shapes[1]:  # unknown, or a number
            if shapes != (None, None):
                return False
            continue
        (n, *size), other = shapes[0], shapes[1]
        if len(size) == 3 and not is_channels_last(large):
            fits = [tuple(size), (size[0], 1, 1), (1, size[1], size[2])]
        else:
            fits = [tuple(size)]
        if other[:1] != (n,) or other[1:] not in fits:
            return False
    if larger_shape_of(large) is None:
        return True
    same = shape_of(large) == shape_of(small), larger_shape_of(large) == larger_shape_of(small)
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
