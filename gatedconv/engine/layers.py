"""The layers that a plan can run, read off the nodes of a traced graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatedconv.engine.lower import ConstantMaps, is_plain, resize_like, shuffle_channels, slice_channels
from gatedconv.nn import ChannelBias, Conv2d, GatherChannels, PadShortcut, ScatterAdd

Pair = tuple[int, int]


@dataclass
class Layer:
    """One instruction of a plan before it is packed.

    Attributes:
        kind: "conv", "affine" (scale and shift per channel), "act", "prelu", "add", "multiply", "scatter_add", "gather",
            "cat", "slice", "subsample", "fill" (a constant per channel), "max_pool", "avg_pool", "mean_pool",
            "adaptive_max_pool", "adaptive_avg_pool", "nearest", "bilinear", "pixel_shuffle", "layer_norm",
            "group_norm", "softmax" or "alias" (a view of the same map).
        name: The module or function it came from.
        inputs: The maps it reads; of "add", "multiply" and "scatter_add" the other operand is `residual`.
        output: The node whose value it makes.
        kernel: Kernel, or the size of an adaptive pooling's output, or the factor of "nearest", "bilinear" and
            "pixel_shuffle".
        padding: Pixels at the top, left, bottom and right.
        groups: Of a convolution or a group norm.
        weight: (C_out, C_in / groups, KH, KW); (C,) for "affine" and norms; float64.
        bias: (C_out,), float64; the slopes of "prelu".
        act: Name of an activation (`gatedconv.engine.program.ACTS`) or None.
        value: Slope or alpha of the activation.
        epsilon: Of a norm.
        residual: The other operand; of "nearest" and "bilinear" the map whose size is wanted.
        gate: A map (N, C, 1, 1) that the input of a 1x1 convolution is multiplied by.
        before: Scale and shift of a 1x1 convolution's input, float64, and the activation that follows.
        index: Channel list of "gather" and "scatter_add".
        option: Channels in front of "subsample"; first channel of "slice"; 1 if "avg_pool" counts its padding or
            "bilinear" aligns the corners.
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
    value: float = 0.0
    epsilon: float = 0.0
    residual: fx.Node | None = None
    gate: fx.Node | None = None
    before: tuple[Tensor, Tensor, str | None] | None = None
    index: list[int] = field(default_factory=list)
    option: int = 0


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Return the shape that tracing found for a node, None if it is no float32 tensor."""
    meta: Any = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if hasattr(meta, "shape") and meta.dtype == torch.float32 else None


def larger_shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return a node's shape for an image larger than the example, None if the model takes none."""
    shape: tuple[int, ...] | None = node.meta.get("larger_shape")
    return shape


def is_map(node: Any) -> bool:
    """Whether a node's value is a batch of feature maps (2, C, H, W), the batch of the tracing example."""
    shape = shape_of(node)
    return shape is not None and len(shape) == 4 and shape[0] == 2 and min(shape) > 0 and not is_channels_last(node)


def is_channels_last(node: fx.Node) -> bool:
    """Whether a node's value is a map whose axes were permuted to (2, H, W, C)."""
    return bool(node.meta.get("channels_last"))


def is_vector(node: Any) -> bool:
    """Whether a node's value is a batch of vectors (2, C)."""
    shape = shape_of(node)
    return shape is not None and len(shape) == 2 and shape[0] == 2 and min(shape) > 0


def map_size(node: fx.Node) -> tuple[int, int, int]:
    """Return channels, height and width of the map that a node's value is stored as."""
    shape = (*node.meta["tensor_meta"].shape, 1, 1)
    return (shape[3], shape[1], shape[2]) if is_channels_last(node) else (shape[1], shape[2], shape[3])


def _is_stored(node: Any) -> bool:
    return is_map(node) or is_vector(node) or (isinstance(node, fx.Node) and is_channels_last(node))


_CUDA_KINDS = {"conv", "affine", "act", "add", "scatter_add", "gather", "subsample", "max_pool", "avg_pool", "mean_pool",
               "alias"}  # fmt: skip


def runs_on_cuda(layer: Layer) -> bool:
    """Whether `CudaPlan` runs a layer."""
    if layer.kind not in _CUDA_KINDS or layer.act not in (None, "relu", "relu6"):
        return False
    whole = layer.kind != "add" or shape_of(layer.residual) == shape_of(layer.inputs[0])
    return whole and not any(is_channels_last(node) for node in (*layer.inputs, layer.output))


# What may read and make maps whose axes are permuted: each pixel by itself.
_BY_PIXEL = {"act", "affine", "add", "multiply", "layer_norm", "alias", "conv"}


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
        layer = reader(_Call(node, model)) if reader is not None else None
    elif node.op == "call_method":
        reader = _METHODS.get(str(node.target))
        layer = reader(_Call(node, model)) if reader is not None else None
    else:
        layer = None
    if layer is None:
        return None
    last = [is_channels_last(i) for i in layer.inputs]
    if any(last) and layer.kind in _BY_PIXEL and "permuted" not in node.meta:
        node.meta["channels_last"] = True
    elif any(last) and "permuted" not in node.meta:
        return None
    reads = [*layer.inputs, *([layer.residual] if layer.residual is not None else [])]
    stored = all(_is_stored(one) for one in (*reads, node))
    return layer if stored and len({is_channels_last(one) for one in reads}) == 1 else None


class _Call:
    """A call of a function or method: its arguments by position or name."""

    def __init__(self, node: fx.Node, model: nn.Module) -> None:
        self.node, self.model = node, model
        self.name = node.name

    def get(self, at: int, name: str, default: Any = None) -> Any:
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


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double().clone()


def _layer(kind: str, node: fx.Node, **fields: Any) -> Layer:
    name = str(node.target) if node.op == "call_module" else node.name
    return Layer(kind, name, [_source(node)], node, **fields)


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
    return _layer("conv", node, kernel=kernel, stride=_pair(conv.stride), padding=padding, dilation=dilation,
                  groups=conv.groups, weight=_double(conv.weight), bias=_double(conv.bias))  # fmt: skip


def _linear(node: fx.Node, linear: nn.Linear) -> Layer | None:
    source = _source(node)
    if linear.weight.dtype != torch.float32 or not (is_vector(source) or is_channels_last(source)):
        return None
    weight = _double(linear.weight)
    assert weight is not None
    size = source.meta.get("flattened")  # of the map that was flattened: a convolution as large as the map
    if size is not None:
        weight = weight.view(-1, *size)
        return _layer("conv", node, kernel=size[1:], weight=weight, bias=_double(linear.bias))
    return _layer("conv", node, weight=weight[:, :, None, None], bias=_double(linear.bias))


def _norm(node: fx.Node, norm: nn.BatchNorm2d) -> Layer | None:
    if norm.running_mean is None or norm.running_var is None or norm.running_mean.dtype != torch.float32:
        return None
    if not _is_stored(node.args[0]) or is_channels_last(_source(node)):
        return None
    scale = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return _layer("affine", node, weight=scale, bias=shift)


def _channel_bias(node: fx.Node, module: ChannelBias) -> Layer:
    bias = module.bias.detach().double().clone()
    return _layer("affine", node, weight=torch.ones_like(bias), bias=bias)


def _over_channels(node: fx.Node, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    channels = map_size(node)[0]
    ones = torch.ones(channels, dtype=torch.float64, device="cpu")
    return (ones if weight is None else weight.double().clone(), 0 * ones if bias is None else bias.double().clone())


def _layer_norm(node: fx.Node, norm: nn.LayerNorm) -> Layer | None:
    weight, bias = (None if value is None else value.detach() for value in (norm.weight, norm.bias))
    return _make_layer_norm(node, list(norm.normalized_shape), weight, bias, norm.eps)


def _call_layer_norm(call: _Call) -> Layer | None:
    given = [call.get(2, "weight"), call.get(3, "bias")]
    weight, bias = (call.constant(value) for value in given)
    if any(value is not None and found is None for value, found in zip(given, (weight, bias), strict=True)):
        return None
    return _make_layer_norm(call.node, call.get(1, "normalized_shape"), weight, bias, call.get(4, "eps", 1e-5))


def _make_layer_norm(node: fx.Node, over: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Layer | None:
    source = _source(node)
    if not (is_channels_last(source) or is_vector(source)) or list(over) != [map_size(source)[0]]:
        return None
    scale, shift = _over_channels(source, weight, bias)
    return _layer("layer_norm", node, weight=scale, bias=shift, epsilon=eps)


def _group_norm(node: fx.Node, norm: nn.GroupNorm) -> Layer | None:
    if not is_map(node.args[0]):
        return None
    scale, shift = _over_channels(_source(node), *(None if v is None else v.detach() for v in (norm.weight, norm.bias)))
    return _layer("group_norm", node, groups=norm.num_groups, weight=scale, bias=shift, epsilon=norm.eps)


def _act(act: str, parameter: str = "", default: float = 0.0) -> Any:
    """Reader of an activation; `parameter` is the module's attribute and the function's argument for its value."""

    def read(node: fx.Node, module: nn.Module) -> Layer:
        return _layer("act", node, act=act, value=float(getattr(module, parameter)) if parameter else 0.0)

    def read_call(call: _Call) -> Layer | None:
        value = call.get(1, parameter, default) if parameter else 0.0
        fine = isinstance(call.node.args[0], fx.Node) and isinstance(value, (int, float))
        return _layer("act", call.node, act=act, value=float(value)) if fine else None

    return read, read_call


def _hardtanh(node: fx.Node, module: nn.Hardtanh) -> Layer | None:
    return _layer("act", node, act="relu6") if (module.min_val, module.max_val) == (0, 6) else None


def _call_hardtanh(call: _Call) -> Layer | None:
    fits = (call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0)) == (0, 6)
    return _layer("act", call.node, act="relu6") if fits else None


def _gelu(node: fx.Node, module: nn.GELU) -> Layer:
    return _layer("act", node, act="gelu_tanh" if module.approximate == "tanh" else "gelu")


def _call_gelu(call: _Call) -> Layer | None:
    act = {"none": "gelu", "tanh": "gelu_tanh"}.get(call.node.kwargs.get("approximate", "none"))  # type: ignore[arg-type]
    return _layer("act", call.node, act=act) if act else None


def _prelu(node: fx.Node, module: nn.PReLU) -> Layer | None:
    slopes = module.weight.detach().double().clone()
    if not (is_map(node.args[0]) or is_vector(node.args[0])) or module.weight.dtype != torch.float32:
        return None
    return _layer("prelu", node, bias=slopes.expand(map_size(_source(node))[0]).clone())


def _binary(kind: str, scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Reader of a sum or product of two maps, one of which may be a broadcast; or of a map and a constant.

    With the constant c the layer is x * scale(c) + shift(c).
    """

    def read(call: _Call) -> Layer | None:
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
    channels = map_size(node)[0] if _is_stored(node) else 0
    axis = 1 if is_vector(node) or is_channels_last(node) else 3  # of the channels, from the end
    shape = [1] * (axis - value.dim()) + list(value.shape)
    at = len(shape) - axis
    if any(length != 1 for i, length in enumerate(shape) if i != at) or shape[at] not in (1, channels):
        return None
    return value.reshape(-1).expand(channels).clone()


def _broadcasts(large: fx.Node, small: fx.Node) -> bool:
    """Whether `small` has the size of `large`, or one pixel, or one channel, whatever the size of the images."""
    for shapes in ((shape_of(large), shape_of(small)), (larger_shape_of(large), larger_shape_of(small))):
        if shapes[0] is None or shapes[1] is None:
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


def _constant_right(scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Reader of x - c and x / c."""

    def read(call: _Call) -> Layer | None:
        source, value = call.node.args[0], call.constant(call.get(1, "other"))
        if len(call.node.args) != 2 or call.node.kwargs or value is None or not isinstance(source, fx.Node):
            return None
        channels = _per_channel(value, source) if shape_of(source) == shape_of(call.node) else None
        if channels is None:
            return None
        return _layer("affine", call.node, weight=scale(channels), bias=shift(channels))

    return read


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
    return _layer("gather", node, index=[int(i) for i in module.index])


def _shuffled(node: fx.Node, groups: int) -> Layer | None:
    if not is_map(node.args[0]):
        return None
    return _layer(
        "gather", node, index=torch.arange(map_size(_source(node))[0]).view(groups, -1).t().reshape(-1).tolist()
    )


def _cat(call: _Call) -> Layer | None:
    nodes, node = call.get(0, "tensors"), call.node
    if not isinstance(nodes, (list, tuple)) or not all(isinstance(one, fx.Node) for one in nodes):
        return None
    if call.get(1, "dim", 0) not in (1, 1 - len(shape_of(node) or ())) or not all(
        is_map(n) or is_vector(n) for n in nodes
    ):
        return None
    return Layer("cat", node.name, list(nodes), node)


def _slice(call: _Call) -> Layer | None:
    return _layer("slice", call.node, option=int(call.get(1, "start"))) if is_map(call.node.args[0]) else None


def _subsample(node: fx.Node, module: PadShortcut) -> Layer:
    return _layer("subsample", node, stride=(module.stride, module.stride), option=module.front)


def _fill(node: fx.Node, module: ConstantMaps) -> Layer:
    return _layer("fill", node, stride=(module.stride, module.stride), bias=_double(module.value))


def _window(kind: str, node: fx.Node, kernel: Any, stride: Any, padding: Any, option: int = 0) -> Layer | None:
    if not is_map(node.args[0]):
        return None
    top, left = _pair(padding)
    stride = kernel if stride is None or stride == () or stride == [] else stride
    return _layer(kind, node, kernel=_pair(kernel), stride=_pair(stride), padding=(top, left, top, left), option=option)


def _max_pool(node: fx.Node, pool: nn.MaxPool2d) -> Layer | None:
    if pool.ceil_mode or pool.return_indices or _pair(pool.dilation) != (1, 1):
        return None
    return _window("max_pool", node, pool.kernel_size, pool.stride, pool.padding)


def _call_max_pool(call: _Call) -> Layer | None:
    if _pair(call.get(4, "dilation", 1)) != (1, 1) or call.get(5, "ceil_mode", False):
        return None
    if call.get(6, "return_indices", False):
        return None
    return _window("max_pool", call.node, *(call.get(i, n, d) for i, n, d in _WINDOW))


def _avg_pool(node: fx.Node, pool: nn.AvgPool2d) -> Layer | None:
    if pool.ceil_mode or pool.divisor_override is not None:
        return None
    return _window("avg_pool", node, pool.kernel_size, pool.stride, pool.padding, int(pool.count_include_pad))


def _call_avg_pool(call: _Call) -> Layer | None:
    if call.get(4, "ceil_mode", False) or call.get(6, "divisor_override") is not None:
        return None
    values = [call.get(i, n, d) for i, n, d in _WINDOW]
    if any(
        isinstance(v, fx.Node) for value in values for v in (value if isinstance(value, (tuple, list)) else [value])
    ):
        return None
    return _window("avg_pool", call.node, *values, int(call.get(5, "count_include_pad", True)))


_WINDOW = ((1, "kernel_size", None), (2, "stride", None), (3, "padding", 0))


def _adaptive(kind: str, node: fx.Node, size: Any) -> Layer | None:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if not is_map(node.args[0]) or len(sides) != 2 or not all(isinstance(s, int) for s in sides):
        return None
    if kind == "avg" and sides == (1, 1):
        return _layer("mean_pool", node)
    return _layer(f"adaptive_{kind}_pool", node, kernel=sides)


def _mean(call: _Call) -> Layer | None:
    dims: Any = call.get(1, "dim")
    if not isinstance(dims, (tuple, list)) or not is_map(call.node.args[0]):
        return None
    if sorted(int(d) % 4 for d in dims) != [2, 3] or call.node.kwargs.get("dtype") is not None:
        return None
    return _layer("mean_pool", call.node)


def _resample(node: fx.Node, factor: Any, mode: Any, corners: Any) -> Layer | None:
    if not is_map(node.args[0]) or not isinstance(factor, (int, float, tuple, list)):
        return None
    sides = (factor, factor) if isinstance(factor, (int, float)) else tuple(factor)
    if mode not in ("nearest", "bilinear") or len(sides) != 2 or any(s != int(s) or s < 1 for s in sides):
        return None
    return _layer(mode, node, kernel=(int(sides[0]), int(sides[1])), option=int(bool(corners)))


def _upsample(node: fx.Node, module: nn.Upsample) -> Layer | None:
    if module.size is not None or module.recompute_scale_factor:
        return None
    return _resample(node, module.scale_factor, module.mode, module.align_corners)


def _interpolate(call: _Call) -> Layer | None:
    if call.get(1, "size") is not None or call.get(5, "recompute_scale_factor") or call.get(6, "antialias"):
        return None
    return _resample(
        call.node, call.get(2, "scale_factor"), call.get(3, "mode", "nearest"), call.get(4, "align_corners")
    )


def _resize_like(call: _Call) -> Layer | None:
    source, reference, mode, corners = call.node.args
    if mode not in ("nearest", "bilinear") or not is_map(source) or not is_map(reference):
        return None
    return _layer(str(mode), call.node, residual=reference, option=int(bool(corners)))


def _pixel_shuffle(node: fx.Node, factor: Any) -> Layer | None:
    return _layer("pixel_shuffle", node, kernel=(factor, factor)) if is_map(node.args[0]) else None


def _softmax(node: fx.Node, dim: Any) -> Layer | None:
    shape = shape_of(node.args[0]) or ()
    return _layer("softmax", node) if _is_stored(node.args[0]) and dim in (1, 1 - len(shape)) else None


def _flatten(node: fx.Node, start: Any, end: Any) -> Layer | None:
    """A map of one pixel becomes a vector: nothing to compute. A larger one may only be read by linear layers."""
    source = _source(node)
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
    return _layer("alias", node)


def _permute(node: fx.Node, dims: Any) -> Layer | None:
    source = _source(node)
    order = tuple(int(d) % 4 for d in dims)
    if len(source.users) > 1 and not is_channels_last(source) and _written_in_place(source, node):
        return None
    if order == (0, 2, 3, 1) and is_map(source):
        node.meta["channels_last"] = node.meta["permuted"] = True
    elif order == (0, 3, 1, 2) and is_channels_last(source):
        node.meta["permuted"] = True
    else:
        return None
    return _layer("alias", node)


def _written_in_place(source: fx.Node, but: fx.Node) -> bool:
    return any(str(user.target).endswith("_") or user.kwargs.get("inplace") for user in source.users if user is not but)


def _call_permute(call: _Call) -> Layer | None:
    dims = call.node.args[1] if isinstance(call.node.args[1], (tuple, list)) else call.node.args[1:]
    return _permute(call.node, dims) if len(dims) == 4 else None


def _contiguous(call: _Call) -> Layer | None:
    return _layer("alias", call.node) if len(_source(call.node).users) == 1 and not call.node.kwargs else None


def _of_call(read: Callable[..., Layer | None], *arguments: tuple[int, str, Any]) -> Callable[[_Call], Layer | None]:
    """A reader of calls from one that takes the node and some of its arguments."""
    return lambda call: read(call.node, *(call.get(*argument) for argument in arguments))


_RELU, _CALL_RELU = _act("relu")
_RELU6, _CALL_RELU6 = _act("relu6")
_LEAKY, _CALL_LEAKY = _act("leaky_relu", "negative_slope", 0.01)
_ELU, _CALL_ELU = _act("elu", "alpha", 1.0)
_SILU, _CALL_SILU = _act("silu")
_HARD_SWISH, _CALL_HARD_SWISH = _act("hard_swish")
_HARD_SIGMOID, _CALL_HARD_SIGMOID = _act("hard_sigmoid")
_SIGMOID, _CALL_SIGMOID = _act("sigmoid")
_TANH, _CALL_TANH = _act("tanh")
_MISH, _CALL_MISH = _act("mish")
_PLUS = _binary("add", torch.ones_like, lambda c: c)
_TIMES = _binary("multiply", lambda c: c, torch.zeros_like)
_MINUS = _constant_right(torch.ones_like, lambda c: -c)
_OVER = _constant_right(lambda c: 1 / c, torch.zeros_like)

_MODULES: dict[type[nn.Module], Callable[..., Layer | None]] = {
    nn.Conv2d: _conv,
    Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.ReLU: _RELU,
    nn.ReLU6: _RELU6,
    nn.Hardtanh: _hardtanh,
    nn.LeakyReLU: _LEAKY,
    nn.PReLU: _prelu,
    nn.ELU: _ELU,
    nn.SiLU: _SILU,
    nn.Hardswish: _HARD_SWISH,
    nn.Hardsigmoid: _HARD_SIGMOID,
    nn.Sigmoid: _SIGMOID,
    nn.Tanh: _TANH,
    nn.GELU: _gelu,
    nn.Mish: _MISH,
    nn.Softmax: lambda node, module: _softmax(node, module.dim),
    nn.Softmax2d: lambda node, module: _softmax(node, 1),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: lambda node, pool: _adaptive("avg", node, pool.output_size),
    nn.AdaptiveMaxPool2d: lambda node, pool: None if pool.return_indices else _adaptive("max", node, pool.output_size),
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    nn.PixelShuffle: lambda node, module: _pixel_shuffle(node, module.upscale_factor),
    nn.ChannelShuffle: lambda node, module: _shuffled(node, module.groups),
    nn.Flatten: lambda node, module: _flatten(node, module.start_dim, module.end_dim),
    ChannelBias: _channel_bias,
    ConstantMaps: _fill,
    GatherChannels: _gather,
    PadShortcut: _subsample,
    ScatterAdd: _scatter_add,
}

_FUNCTIONS: dict[Any, Callable[[_Call], Layer | None]] = {
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
    F.hardtanh: _call_hardtanh,
    F.leaky_relu: _CALL_LEAKY,
    F.elu: _CALL_ELU,
    F.silu: _CALL_SILU,
    F.hardswish: _CALL_HARD_SWISH,
    F.hardsigmoid: _CALL_HARD_SIGMOID,
    F.sigmoid: _CALL_SIGMOID,
    torch.sigmoid: _CALL_SIGMOID,
    F.tanh: _CALL_TANH,
    torch.tanh: _CALL_TANH,
    F.gelu: _call_gelu,
    F.mish: _CALL_MISH,
    F.softmax: _of_call(_softmax, (1, "dim", None)),
    torch.softmax: _of_call(_softmax, (1, "dim", None)),
    F.layer_norm: _call_layer_norm,
    torch.flatten: _of_call(_flatten, (1, "start_dim", 0), (2, "end_dim", -1)),
    torch.permute: _call_permute,
    torch.mean: _mean,
    torch.cat: _cat,
    torch.concat: _cat,
    slice_channels: _slice,
    shuffle_channels: _of_call(_shuffled, (1, "groups", 1)),
    resize_like: _resize_like,
    F.interpolate: _interpolate,
    F.pixel_shuffle: _of_call(_pixel_shuffle, (1, "upscale_factor", 1)),
    F.channel_shuffle: _of_call(_shuffled, (1, "groups", 1)),
    F.max_pool2d: _call_max_pool,
    F.avg_pool2d: _call_avg_pool,
    F.adaptive_avg_pool2d: lambda call: _adaptive("avg", call.node, call.get(1, "output_size")),
}

_METHODS: dict[str, Callable[[_Call], Layer | None]] = {
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
    "mean": _mean,
}
