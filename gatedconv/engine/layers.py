"""The layers that a plan can run, read off the nodes of a traced graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatedconv.engine.graph import ConstantMaps, is_plain
from gatedconv.nn import ChannelBias, Conv2d, GatherChannels, PadShortcut, ScatterAdd

Pair = tuple[int, int]


@dataclass
class Layer:
    """One instruction of a plan before it is packed.

    Attributes:
        kind: "conv", "affine" (scale and shift per channel), "act", "add", "scatter_add", "gather",
            "subsample", "fill" (a constant per channel), "max_pool", "avg_pool", "mean_pool" or "alias" (a view of
            the same map).
        name: The module or function it came from.
        inputs: The maps it reads; of "add" and "scatter_add" the other operand is `residual`.
        output: The node whose value it makes.
        padding: Pixels at the top, left, bottom and right.
        weight: (C_out, C_in / groups, KH, KW), or (C,) for "affine"; float64.
        bias: (C_out,), float64.
        act: "relu", "relu6" or None.
        index: Channel list of "gather" and "scatter_add".
        option: Channels in front of "subsample"; 1 if "avg_pool" counts its padding.
    """

    kind: str
    name: str
    inputs: list[fx.Node]
    output: fx.Node
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    act: str | None = None
    residual: fx.Node | None = None
    index: list[int] = field(default_factory=list)
    option: int = 0


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape that `propagate_shapes` found for a node, None if it is no float32 tensor."""
    meta: Any = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") and meta.dtype == torch.float32 else None


def larger_shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return a node's shape for an image larger than the example, None if the model takes none."""
    shape: tuple[int, ...] | None = node.meta.get("larger_shape")
    return shape


def is_map(node: Any) -> bool:
    """Whether a node's value is a batch of feature maps (2, C, H, W), the batch of the tracing example."""
    shape = shape_of(node) if isinstance(node, fx.Node) else None
    return shape is not None and len(shape) == 4 and shape[0] == 2 and min(shape) > 0


def is_vector(node: Any) -> bool:
    """Whether a node's value is a batch of vectors (2, C)."""
    shape = shape_of(node) if isinstance(node, fx.Node) else None
    return shape is not None and len(shape) == 2 and shape[0] == 2 and min(shape) > 0


def read_layer(node: fx.Node, model: nn.Module) -> Layer | None:
    """Return the layer that computes a node, None if no plan can.

    Shapes must have been propagated with a batch of two images, so that a broadcast shows.
    """
    if not (is_map(node) or is_vector(node)) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        reader = next((_MODULES[base] for base in type(module).__mro__ if base in _MODULES), None)
        # A subclass may compute something else: only types that are known are read.
        known = type(module) in _MODULES or (type(module) is Conv2d and module.gate is None)
        layer = reader(node, module) if reader is not None and known and is_plain(module) else None
    elif node.op == "call_function":
        reader = _FUNCTIONS.get(node.target)
        layer = reader(node) if reader is not None else None
    elif node.op == "call_method":
        reader = _METHODS.get(str(node.target))
        layer = reader(node) if reader is not None else None
    else:
        layer = None
    if layer is not None and not all(is_map(i) or is_vector(i) for i in layer.inputs):
        return None
    return layer


def _source(node: fx.Node) -> fx.Node:
    """Return the first argument, which read_layer has found to be a node."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double().clone()


def _conv(node: fx.Node, conv: nn.Conv2d) -> Layer | None:
    if conv.padding_mode != "zeros" or not is_map(node.args[0]) or conv.weight.dtype != torch.float32:
        return None
    kernel, dilation = _pair(conv.kernel_size), _pair(conv.dilation)
    if conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    elif conv.padding == "valid":
        padding = (0, 0, 0, 0)
    else:
        top, left = _pair(conv.padding)
        padding = (top, left, top, left)
    return Layer(
        "conv",
        str(node.target),
        [_source(node)],
        node,
        kernel,
        _pair(conv.stride),
        padding,
        dilation,
        conv.groups,
        _double(conv.weight),
        _double(conv.bias),
    )


def _linear(node: fx.Node, linear: nn.Linear) -> Layer | None:
    if not is_vector(node.args[0]) or linear.weight.dtype != torch.float32:
        return None
    weight = _double(linear.weight)
    assert weight is not None
    return Layer(
        "conv",
        str(node.target),
        [_source(node)],
        node,
        weight=weight[:, :, None, None],
        bias=_double(linear.bias),
    )


def _norm(node: fx.Node, norm: nn.BatchNorm2d) -> Layer | None:
    if norm.running_mean is None or norm.running_var is None or norm.running_mean.dtype != torch.float32:
        return None
    scale = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return Layer("affine", str(node.target), [_source(node)], node, weight=scale, bias=shift)


def _channel_bias(node: fx.Node, module: ChannelBias) -> Layer:
    bias = module.bias.detach().double().clone()
    return Layer("affine", str(node.target), [_source(node)], node, weight=torch.ones_like(bias), bias=bias)


def _act(act: str) -> Callable[..., Layer | None]:
    def read(node: fx.Node, module: nn.Module | None = None) -> Layer | None:
        if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) != (0, 6):
            return None
        return Layer("act", str(node.target), [_source(node)], node, act=act)

    return read


def _add(node: fx.Node) -> Layer | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = _source(node), node.args[1]
    if not isinstance(right, fx.Node) or not is_map(left) or shape_of(left) != shape_of(right):
        return None
    if larger_shape_of(left) != larger_shape_of(right):
        return None  # equal at the example's size alone, a broadcast at others
    return Layer("add", node.name, [right], node, residual=left)


def _scatter_add(node: fx.Node, module: ScatterAdd) -> Layer | None:
    stream, part = _source(node), node.args[1]
    if not isinstance(part, fx.Node) or not is_map(part) or shape_of(stream) != shape_of(node):
        return None
    if module.axis not in (1, -3):
        return None
    index = [int(i) for i in module.index]
    if sorted(set(index)) != index:
        return None
    return Layer("scatter_add", str(node.target), [part], node, residual=stream, index=index)


def _gather(node: fx.Node, module: GatherChannels) -> Layer | None:
    if module.axis not in (1, -3) or not is_map(node):
        return None
    return Layer("gather", str(node.target), [_source(node)], node, index=[int(i) for i in module.index])


def _subsample(node: fx.Node, module: PadShortcut) -> Layer:
    stride = (module.stride, module.stride)
    return Layer("subsample", str(node.target), [_source(node)], node, stride=stride, option=module.front)


def _fill(node: fx.Node, module: ConstantMaps) -> Layer:
    stride = (module.stride, module.stride)
    return Layer("fill", str(node.target), [_source(node)], node, stride=stride, bias=_double(module.value))


def _max_pool(node: fx.Node, pool: nn.MaxPool2d) -> Layer | None:
    if pool.ceil_mode or pool.return_indices or _pair(pool.dilation) != (1, 1):
        return None
    top, left = _pair(pool.padding)
    stride = _pair(pool.stride)
    return Layer(
        "max_pool",
        str(node.target),
        [_source(node)],
        node,
        _pair(pool.kernel_size),
        stride,
        (top, left, top, left),
    )


def _avg_pool(node: fx.Node, pool: nn.AvgPool2d) -> Layer | None:
    if pool.ceil_mode or pool.divisor_override is not None:
        return None
    top, left = _pair(pool.padding)
    return Layer(
        "avg_pool",
        str(node.target),
        [_source(node)],
        node,
        _pair(pool.kernel_size),
        _pair(pool.stride),
        (top, left, top, left),
        option=int(pool.count_include_pad),
    )


def _mean_pool(node: fx.Node, pool: nn.AdaptiveAvgPool2d | None = None) -> Layer | None:
    size = pool.output_size if pool is not None else node.args[1] if len(node.args) == 2 else None
    if size not in (1, (1, 1), [1, 1]) or node.kwargs:
        return None
    return Layer("mean_pool", str(node.target), [_source(node)], node)


def _mean(node: fx.Node) -> Layer | None:
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if (
        not isinstance(dims, (tuple, list))
        or not is_map(node.args[0])
        or set(node.kwargs) - {"dim", "keepdim"}
    ):
        return None
    if sorted(int(d) % 4 for d in dims) != [2, 3]:
        return None
    return Layer("mean_pool", node.name, [_source(node)], node)


def _flatten(node: fx.Node, module: nn.Flatten | None = None) -> Layer | None:
    """A map of one pixel becomes a vector: nothing to compute."""
    source = _source(node)
    # With another reader of the map, a write to either, in place, would be seen in the other.
    if not is_vector(node) or (shape_of(source) or ())[2:] != (1, 1) or len(source.users) > 1:
        return None
    if (larger_shape_of(source) or (1, 1))[-2:] != (1, 1):
        return None  # one pixel at the example's size alone
    return Layer("alias", str(node.target), [source], node)


_MODULES: dict[type[nn.Module], Callable[..., Layer | None]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _norm,
    nn.ReLU: _act("relu"),
    nn.ReLU6: _act("relu6"),
    nn.Hardtanh: _act("relu6"),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _mean_pool,
    nn.Flatten: _flatten,
    ChannelBias: _channel_bias,
    ConstantMaps: _fill,
    GatherChannels: _gather,
    PadShortcut: _subsample,
    ScatterAdd: _scatter_add,
}

_FUNCTIONS: dict[Any, Callable[..., Layer | None]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    torch.relu: _act("relu"),
    torch.relu_: _act("relu"),
    F.relu: _act("relu"),
    F.relu6: _act("relu6"),
    torch.flatten: _flatten,
    torch.mean: _mean,
    F.adaptive_avg_pool2d: _mean_pool,
}

_METHODS: dict[str, Callable[..., Layer | None]] = {
    "add": _add,
    "add_": _add,
    "relu": _act("relu"),
    "relu_": _act("relu"),
    "flatten": _flatten,
    "mean": _mean,
}
