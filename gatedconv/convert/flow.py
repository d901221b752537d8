"""How channels flow through a canonical graph: which dimension they are in, and how each node maps them.

Every tensor gets an axis, its channels' dimension, and every node a kind:

    input, constant, size     the image; what depends on weights alone; integers made of sizes
    channelwise               output channel c depends on input channel c alone
    conv, linear              torch.nn.Conv2d on NCHW; torch.nn.Linear on the last dimension
    binary, cat               element-wise arithmetic of two tensors; concatenation of channels
    move                      channels permuted, selected, or moved to another dimension
    regroup                   pixel shuffle: r * r channels become one
    gate, branch, select      a gate's decision; ``AddBranch``; ``SelectOpen``
    mix                       a norm over channels: shape and axis stay, channels depend on each other
    deferred                  moved, but not (yet) to where channels lie in one dimension
    opaque                    anything else: what is not proven is not touched
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import op_name, submodule
from gatedconv.convert.computed import has_own_hooks, is_conv, is_linear
from gatedconv.convert.trace import attribute, is_random_drop
from gatedconv.gating import Gate
from gatedconv.nn import AddBranch, GatherChannels, SelectOpen, StochasticDepth

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
MIXING_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Hardtanh, nn.LogSigmoid, nn.Softsign, nn.Hardshrink, nn.Softshrink,
    nn.Tanhshrink, nn.Threshold, nn.RReLU,
)  # fmt: skip
DROPS = (nn.modules.dropout._DropoutNd, StochasticDepth)
SPATIAL = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.Upsample, nn.ZeroPad2d,
    nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d,
)  # fmt: skip
UNARY = frozenset(
    "relu relu6 silu gelu hardswish hardsigmoid sigmoid tanh leaky_relu elu selu celu mish softplus hardtanh clamp "
    "clamp_min clamp_max clip abs neg exp log sqrt rsqrt square pow reciprocal float half double to type_as "
    "contiguous clone detach dropout softsign logsigmoid erf sin cos floor ceil round rsub add sub mul div".split()
)
SPATIAL_FUNCTIONS = frozenset(
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d lp_pool2d boolean_dispatch".split()
)
MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, GatherChannels)
REDUCTIONS = frozenset("mean sum amax amin std var norm logsumexp".split())
BINARY = frozenset("add sub mul div maximum minimum".split())
MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t squeeze "
    "unsqueeze getitem chunk split tensor_split split_with_sizes narrow select unbind slice expand roll flip "
    "index_select channel_shuffle alias".split()
)
# Moves whose arguments hold no number of channels: they can be run again on fewer.
RERUNNABLE = frozenset(
    "permute transpose swapaxes swapdims movedim moveaxis t unsqueeze getitem flatten slice roll flip narrow".split()
)


@dataclass(eq=False)
class Channels:
    """What is known of one node.

    Attributes:
        kind: see the module's docstring.
        axis: the channels' dimension; -1 where there is none.
        size: number of channels.
        source: of a move, the node whose channels these are.
        index: of a move, int64 (size,): the source's channel of each channel.
        style: of a move, "same", "gather", "rerun" or "reshape".
        ids: of a deferred node, where in ``source`` each of its elements lies.
    """

    kind: str
    axis: int = -1
    size: int = 0
    source: fx.Node | None = None
    index: Tensor | None = None
    style: str = ""
    ids: Any = field(default=None, repr=False)


class Flow:
    """The channels of every node of a canonical graph with ``meta["val"]``."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.channels: dict[fx.Node, Channels] = {}
        for node in graph_module.graph.nodes:
            self.channels[node] = self._classify(node)

    def __getitem__(self, node: fx.Node) -> Channels:
        return self.channels[node]

    def kind(self, node: fx.Node) -> str:
        """The node's kind."""
        return self.channels[node].kind

    def has_channels(self, node: Any) -> bool:
        """Whether the node is a tensor with a channels' dimension that depends on the input."""
        return isinstance(node, fx.Node) and self.channels[node].axis >= 0

    def _classify(self, node: fx.Node) -> Channels:
        value = node.meta.get("val")
        if node.op == "placeholder":
            return self._plain("input", node)
        if node.op == "output":
            return Channels("output")
        inputs = node.all_input_nodes
        if node.op == "get_attr" or all(self.kind(n) == "constant" for n in inputs):
            # (a gate alone is never constant: it reads the input)
            if node.op != "call_module" or not isinstance(submodule(node), Gate):
                return Channels("constant")
        if not _holds_tensor(value):
            return Channels("size")
        if not self._moves(node):
            for source in inputs:  # channels that went astray: from here on, new ones
                if self.kind(source) == "deferred" and isinstance(source.meta["val"], Tensor):
                    self.channels[source] = self._opaque(source)
        found = self._module(node) if node.op == "call_module" else self._function(node)
        return found or self._opaque(node)

    def _moves(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(submodule(node), MOVING_MODULES)
        return op_name(node) in MOVES or op_name(node) in ("contiguous", "clone")

    def _plain(self, kind: str, node: fx.Node, axis: int | None = None) -> Channels:
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return Channels("opaque" if kind != "gate" else kind)
        axis = axis if axis is not None else (value.dim() - 1 if value.dim() == 3 else 1)
        return Channels(kind, axis, int(value.shape[axis]))

    def _opaque(self, node: fx.Node) -> Channels:
        return self._plain("opaque", node)

    def _same_axis(self, kind: str, node: fx.Node) -> Channels:
        return self._plain(kind, node, self[node.args[0]].axis)  # type: ignore[index]

    def _module(self, node: fx.Node) -> Channels | None:
        module, source = submodule(node), node.args[0] if node.args else None
        if isinstance(module, Gate):
            return self._plain("gate", node, 1)
        if not isinstance(source, fx.Node) or node.kwargs or module is None or has_own_hooks(module):
            return None
        if isinstance(module, AddBranch):
            return self._branch(node)
        if isinstance(module, MOVING_MODULES):
            return self._move(node)
        if not self.has_channels(source):
            return None
        axis, dims = self[source].axis, source.meta["val"].dim()
        image = axis == 1 and dims == 4
        if isinstance(module, SelectOpen):
            return self._same_axis("select", node)
        if is_conv(module):
            return self._plain("conv", node, 1) if image else None
        if is_linear(module):
            return self._plain("linear", node, dims - 1) if axis == dims - 1 else None
        if isinstance(module, nn.PixelShuffle) and image:
            return self._plain("regroup", node, 1)
        if (
            isinstance(module, ACTIVATIONS + DROPS)
            or is_random_drop(module)
            or (isinstance(module, NORMS) and axis == 1)
            or (isinstance(module, nn.PReLU) and (axis == 1 or module.num_parameters == 1))
            or (isinstance(module, SPATIAL) and image and not getattr(module, "return_indices", False))
        ):
            return self._same_axis("channelwise", node)
        return self._same_axis("mix", node) if isinstance(module, MIXING_NORMS) else None

    def _branch(self, node: fx.Node) -> Channels | None:
        shortcut, part = node.args[0], node.args[1]
        if self.has_channels(shortcut) and self.has_channels(part) and self[shortcut].axis == self[part].axis:  # type: ignore[index]
            return self._same_axis("branch", node)
        return None

    def _function(self, node: fx.Node) -> Channels | None:
        name = op_name(node)
        if name in ("cat",):
            return self._cat(node)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if name in BINARY and len(tensors) == 2 and len(node.args) >= 2 and not set(node.kwargs) - {"rounding_mode"}:
            return self._binary(node)
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and (
            name in MOVES or (name in ("contiguous", "clone") and self.kind(source) == "deferred")
        ):
            return self._move(node)
        if name == "conv2d" and self.has_channels(source):
            image = self[source].axis == 1 and source.meta["val"].dim() == 4  # type: ignore[index,union-attr]
            others = [n for n in node.all_input_nodes if n is not source]
            return self._plain("conv", node, 1) if image and all(self.kind(n) == "constant" for n in others) else None
        if name == "rsub" or (name in UNARY and len(node.args) > 1 and not isinstance(source, fx.Node)):
            source = tensors[0] if len(tensors) == 1 else None  # 2 * x
        if len(tensors) != 1 or tensors[0] is not source or not self.has_channels(source):
            return None
        channels, dims = self[source], source.meta["val"].dim()
        if name in UNARY:
            return self._plain("channelwise", node, channels.axis)
        if name == "softmax":
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            return self._plain("channelwise", node, channels.axis) if _excludes(dim, dims, channels.axis) else None
        if name == "pixel_shuffle" and channels.axis == 1 and dims == 4:
            return self._plain("regroup", node, 1)
        if name in SPATIAL_FUNCTIONS or name.startswith("boolean_dispatch"):
            ok = channels.axis == 1 and dims == 4 and isinstance(node.meta["val"], Tensor)
            return self._plain("channelwise", node, 1) if ok else None
        if name == "pad":
            pads = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
            first = dims - len(pads) // 2  # type: ignore[arg-type]
            return self._plain("channelwise", node, channels.axis) if first > channels.axis else None
        return self._reduction(node, name, channels.axis, dims) if name in REDUCTIONS else None

    def _reduction(self, node: fx.Node, name: str, axis: int, dims: int) -> Channels | None:
        position = 2 if name == "norm" else 1
        dim: Any = node.kwargs.get("dim", node.args[position] if len(node.args) > position else None)
        if not _excludes(dim, dims, axis) or not isinstance(node.meta["val"], Tensor):
            return None
        reduced = {d % dims for d in ((dim,) if isinstance(dim, int) else dim)}
        if node.meta["val"].dim() < dims:
            axis -= sum(d < axis for d in reduced)
        return self._plain("channelwise", node, axis)

    def _cat(self, node: fx.Node) -> Channels | None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or not all(map(self.has_channels, parts)):
            return None
        axis = self[parts[0]].axis  # type: ignore[index]
        if dim % node.meta["val"].dim() != axis or any(self[p].axis != axis for p in parts):  # type: ignore[index]
            return None
        return self._plain("cat", node, axis)

    def _binary(self, node: fx.Node) -> Channels | None:
        """Operands line up from the right, as in broadcasting; at least one has the result's channels."""
        value = node.meta["val"]
        axis = None
        for operand in node.args[:2]:
            if self.has_channels(operand):
                found = self[operand].axis + value.dim() - operand.meta["val"].dim()  # type: ignore[index,union-attr]
                if operand.meta["val"].dim() != value.dim():  # type: ignore[union-attr]
                    return None
                if self[operand].size == value.shape[found] and (axis is None or self[operand].size > 1):  # type: ignore[index]
                    if axis not in (None, found):
                        return None
                    axis = found
            elif self.kind(operand) != "constant":  # type: ignore[arg-type]
                return None
        return self._plain("binary", node, axis) if axis is not None else None

    def _move(self, node: fx.Node) -> Channels | None:
        parent: fx.Node = node.args[0]  # type: ignore[assignment]
        channels = self[parent]
        if channels.kind == "deferred":
            source, ids = channels.source, channels.ids
        elif self.has_channels(parent):
            source, ids = parent, torch.arange(parent.meta["val"].numel()).reshape(parent.meta["val"].shape)
        else:
            return None
        assert source is not None
        moved = self._run(node, ids)
        direct = channels.kind != "deferred"
        if isinstance(moved, Tensor):
            found = self._resolve(node, source, moved, direct)
            if found is not None:
                return found
        return Channels("deferred", source=source, ids=moved)

    def _run(self, node: fx.Node, first: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        args = (first, *args[1:])
        if node.op == "call_module":
            return self.graph_module.get_submodule(str(node.target))(*args)
        if node.op == "call_method":
            return getattr(first, str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _resolve(self, node: fx.Node, source: fx.Node, moved: Tensor, direct: bool) -> Channels | None:
        shape, axis = source.meta["val"].shape, self[source].axis
        size = int(shape[axis])
        if moved.dim() < 2 or moved.numel() == 0 or moved.shape[0] != shape[0]:
            return None
        batch = moved // math.prod(shape[1:])
        if not bool((batch == torch.arange(shape[0]).reshape(-1, *[1] * (moved.dim() - 1))).all()):
            return None
        channel = (moved // math.prod(shape[axis + 1 :])) % size
        found = next((a for a in _axes(moved, axis, size) if _only_along(channel, a)), None)
        if found is None:
            return None
        index = channel.movedim(found, 0).reshape(moved.shape[found], -1)[:, 0].clone()
        whole = torch.arange(math.prod(shape)).reshape(shape)
        identity = len(index) == size and torch.equal(index, torch.arange(size))
        if moved.shape == shape and torch.equal(moved, whole):
            style = "same"
        elif found == axis and torch.equal(moved, whole.index_select(axis, index)):
            style = "gather"
        elif direct and identity and (op_name(node) if node.op != "call_module" else "flatten") in RERUNNABLE:
            style = "rerun"
        elif torch.equal(moved.flatten(), whole.flatten()) and _repeats(index, size) and found >= min(axis, 1):
            style = "reshape"
        else:
            return None
        return Channels("move", found, len(index), source, index, style)


def constant_value(graph_module: fx.GraphModule, node: fx.Node, cache: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on weights alone."""
    if node not in cache:
        if node.op == "get_attr":
            cache[node] = attribute(graph_module, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: constant_value(graph_module, n, cache))
            if node.op == "call_function":
                cache[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif node.op == "call_method":
                cache[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                cache[node] = graph_module.get_submodule(str(node.target))(*args, **kwargs)
    return cache[node]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def _excludes(dim: Any, dims: int, axis: int) -> bool:
    """Whether dimensions given as an int or ints leave out the batch and the channels."""
    if isinstance(dim, int) and not isinstance(dim, bool):
        dim = (dim,)
    if not isinstance(dim, (tuple, list)) or not all(isinstance(d, int) for d in dim):
        return False
    return not {d % dims for d in dim} & {0, axis}


def _axes(moved: Tensor, axis: int, size: int) -> list[int]:
    """Dimensions to try, the likeliest first; a single channel can only lie in a dimension of size 1."""
    axes = sorted(range(1, moved.dim()), key=lambda a: (a != axis, a))
    return [a for a in axes if size > 1 or moved.shape[a] == 1]


def _only_along(channel: Tensor, axis: int) -> bool:
    rows = channel.movedim(axis, 0).reshape(channel.shape[axis], -1)
    return bool((rows == rows[:, :1]).all())


def _repeats(index: Tensor, size: int) -> bool:
    """Whether each of the channels appears equally often, in order: 0, 0, 1, 1, 2, 2."""
    return len(index) % size == 0 and torch.equal(index, torch.arange(size).repeat_interleave(len(index) // size))
