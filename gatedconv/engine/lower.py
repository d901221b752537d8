"""Traces a model into a graph of values: nothing in place, no layers without effect, idioms as one call, shapes."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatedconv.nn import (
    ChannelBias,
    ConstantMap,
    Conv2d,
    EmptyMap,
    GatherChannels,
    PadShortcut,
    ScatterAdd,
    ScatterChannels,
)

_LEAVES = (ChannelBias, ConstantMap, Conv2d, EmptyMap, GatherChannels, PadShortcut, ScatterAdd, ScatterChannels)
_IN_PLACE_FUNCTIONS = {operator.iadd, operator.imul, operator.isub, operator.itruediv, torch.relu_}
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# By name: torchvision need not be installed.
_NOTHING_UNLESS_TRAINING = {"dropout": 2, "dropout2d": 2, "stochastic_depth": 3}  # position of `training`


class ConstantMaps(EmptyMap):
    """A constant for every channel, of the size of a convolution's output: (N, C, H, W) -> (N, K, H', W')."""

    value: Tensor  # (K,)

    def __init__(self, value: Tensor, window: EmptyMap) -> None:
        w = window
        super().__init__(value.numel(), w.kernel_size, w.stride, w.padding, w.dilation)
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """Spread the constants over the map."""
        return super().forward(x) + self.value[:, None, None]


def _constant_maps(module: nn.Module) -> ConstantMaps | None:
    """What a module computes if that is a constant for every channel, whatever its input; else None."""
    if type(module) is ConstantMap:
        stride = (module.stride, module.stride)
        return ConstantMaps(module.value.detach(), EmptyMap(0, (1, 1), stride, (0, 0), (1, 1)))
    if type(module) is EmptyMap and module.channels:
        return ConstantMaps(torch.zeros(module.channels, device="cpu"), module)
    return None


def slice_channels(x: Tensor, start: int, stop: int) -> Tensor:
    """(N, C, H, W) -> (N, stop - start, H, W): one part of a chunk, a split or a slice."""
    return x[:, start:stop]


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) -> the same, channel g * (C / groups) + i moved to i * groups + g."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def resize_like(x: Tensor, reference: Tensor, mode: str, align_corners: bool | None) -> Tensor:
    """(N, C, H, W), (N, K, H', W') -> (N, C, H', W')."""
    return F.interpolate(x, size=reference.shape[2:], mode=mode, align_corners=align_corners)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat the modules that a plan knows as one node each."""
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Let a model iterate over the parts of a chunk or a split whose number is written in the call."""
        return _Parts(node, self) if _count_parts(node) else super().proxy(node)


class _Parts(fx.Proxy):
    """The result of a chunk or a split."""

    def __len__(self) -> int:
        return _count_parts(self.node)

    def __iter__(self) -> Iterator[fx.Proxy]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]


def _count_parts(node: fx.Node) -> int:
    """The number of parts that a chunk or a split names, 0 if it names none."""
    if _name(node) == "chunk":
        parts = _argument(node, 1, "chunks")
        return parts if isinstance(parts, int) else 0
    sizes = _argument(node, 1, "split_size") if _name(node) == "split" else 0
    return len(sizes) if isinstance(sizes, (list, tuple)) else 0


def trace(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """Return a traced eval copy of `model`, with shapes for two images of example_input's size on its nodes.

    Raises:
        Exception: Whatever tracing or the trial run raises: the model is not traceable.
    """
    source = copy.deepcopy(model)
    source.eval()
    for name, module in list(source.named_modules()):
        maps = _constant_maps(module) if name and example_input.device.type == "cpu" else None  # CPU plans know them
        if maps is not None:
            source.set_submodule(name, maps)
    if not is_plain(source) or len(inspect.signature(source.forward).parameters) != 1:
        # A tracer calls a root's forward without its hooks, and takes its defaults for inputs; a child it calls.
        source = nn.Sequential(source)
    graph = _Tracer().trace(source)
    traced = fx.GraphModule(source, graph, type(model).__name__)
    _drop_nothing(traced)
    _make_functional(traced)
    _fold_constants(traced)
    traced.graph.lint()
    traced.recompile()
    _, channels, height, width = example_input.shape
    with torch.no_grad():
        # Not zeros: a model may divide by what it sees.
        _Shapes(traced).run(torch.full((2, channels, height, width), 0.5, dtype=torch.float32, device="cpu"))
    _note_larger_shapes(traced, (2, channels, 4 * height, 4 * width))
    _join_idioms(traced)
    if example_input.device.type == "cpu":
        _fill_empty_maps(traced)
    return traced


def _note_larger_shapes(traced: fx.GraphModule, size: tuple[int, int, int, int]) -> None:
    """Keep every tensor's shape for a larger image, too, where the model takes one: what holds at one size only shows.

    On the meta device, where a run costs nothing.
    """
    try:
        with torch.no_grad():
            shapes = _LargerShapes(copy.deepcopy(traced).to("meta"), graph=traced.graph)
            shapes.run(torch.empty(size, dtype=torch.float32, device="meta"))
    except Exception:  # the model's own code, which may raise anything: it is for one size, or not for this device
        for node in traced.graph.nodes:
            node.meta.pop("larger_shape", None)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a module is its class's forward and nothing else: no hooks, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _Shapes(fx.Interpreter):
    """Keeps shape and dtype of every tensor; unlike PyTorch's ShapeProp it prints nothing when a node raises."""

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node's value and keep its shape and dtype."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["tensor_meta"] = torch.empty(result.shape, dtype=result.dtype, device="meta")
        return result


class _LargerShapes(fx.Interpreter):
    """Keeps the shape of every tensor."""

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node's value and keep its shape."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["larger_shape"] = tuple(result.shape)
        return result


def _drop_nothing(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        nothing = isinstance(module, _NOTHING_IN_EVAL) and is_plain(module)
        if node.op == "call_function":
            at = _NOTHING_UNLESS_TRAINING.get(getattr(node.target, "__name__", ""))
            training = node.kwargs.get("training", node.args[at] if at and len(node.args) > at else True)
            nothing = at is not None and training is False and isinstance(node.args[0], fx.Node)
        if nothing:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _make_functional(traced: fx.GraphModule) -> None:
    """Let every later reader of a tensor that is written in place read the writer's result."""
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if _is_in_place(node, traced) and isinstance(node.args[0], fx.Node):
            written = node.args[0]
            written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023


def _fold_constants(traced: fx.GraphModule) -> None:
    """Compute what depends on the model's own tensors alone, such as standardized weights."""
    for node in list(traced.graph.nodes):
        reads = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not reads or _is_in_place(node, traced):
            continue
        if any(read.op != "get_attr" for read in reads):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda read: _attribute(traced, str(read.target)))
        with torch.no_grad():
            value = (
                node.target(*args, **kwargs)
                if callable(node.target)
                else getattr(args[0], node.target)(*args[1:], **kwargs)
            )
        if isinstance(value, Tensor):
            name = f"constant_{node.name}"
            traced.register_buffer(name, value.detach().clone(), persistent=False)
            with traced.graph.inserting_before(node):
                node.replace_all_uses_with(traced.graph.get_attr(name))
            traced.graph.erase_node(node)


def _attribute(model: nn.Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _is_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_function":
        return node.target in _IN_PLACE_FUNCTIONS or bool(node.kwargs.get("inplace", False))
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")


def _join_idioms(traced: fx.GraphModule) -> None:
    """Write chunks, splits, channel shuffles and resizing to another map's size as one call each."""
    for node in list(traced.graph.nodes):
        call = _slice(node, traced) or _shuffle(node) or _resize(node) or _flatten(node)
        if call is None:
            continue
        function, args = call
        with traced.graph.inserting_before(node):
            joined = traced.graph.call_function(function, args)
        joined.meta.update({key: node.meta[key] for key in ("tensor_meta", "larger_shape") if key in node.meta})
        node.replace_all_uses_with(joined)
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and not _is_in_place(node, traced):
            traced.graph.erase_node(node)
    traced.recompile()


def _fill_empty_maps(traced: fx.GraphModule) -> None:
    """Write constants that are scattered into a map without channels as constants of its size."""
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is not ScatterChannels or module.axis != 1 or module.index.numel() or _size(node) is None:
            continue
        source, window = node.args[0], EmptyMap(0, (1, 1), (1, 1), (0, 0), (1, 1))
        while isinstance(source, fx.Node) and (_size(source) or (0, 1))[1] == 0:
            maker = traced.get_submodule(str(source.target)) if source.op == "call_module" else None
            if type(maker) is EmptyMap:
                source, window = source.args[0], maker
                break
            source = source.args[0] if type(maker) is GatherChannels and maker.axis == 1 else None
        if not isinstance(source, fx.Node) or len(_size(source) or ()) != 4:
            continue
        name = f"constant_maps_{node.name}"
        traced.add_submodule(name, ConstantMaps(module.fill.detach().flatten(), window))
        with traced.graph.inserting_before(node):
            constant = traced.graph.call_module(name, (source,))
        constant.meta.update(node.meta)
        node.replace_all_uses_with(constant)
    chosen = (EmptyMap, GatherChannels, ScatterChannels)
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), chosen):
            traced.graph.erase_node(node)
    traced.recompile()


def _size(node: Any, larger: bool = False) -> tuple[int, ...] | None:
    if not isinstance(node, fx.Node):
        return None
    meta = node.meta.get("larger_shape") if larger else getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if meta is None else tuple(meta)


def _name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def _argument(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def _slice(node: fx.Node, traced: fx.GraphModule) -> tuple[Any, tuple[Any, ...]] | None:
    """An element of a chunk or split over the channels, or a slice of channels."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    parts, index = node.args[0], node.args[1]
    shape = _size(node)
    if isinstance(index, tuple):
        source, start = parts, None
        full = slice(None, None, None)
        if len(index) < 2 or index[0] != full or any(i != full for i in index[2:]) or not isinstance(index[1], slice):
            return None
        size = _size(source)
        if size is None or not all(v is None or isinstance(v, int) for v in (index[1].start, index[1].stop)):
            return None
        start, _, step = index[1].indices(size[1])
        if step != 1:
            return None
    elif isinstance(index, int) and _name(parts) in ("chunk", "split"):
        source = parts.args[0] if parts.args else None  # type: ignore[assignment]
        given = parts.args[1] if len(parts.args) > 1 else None
        size = _size(source)
        if _argument(parts, 2, "dim", 0) not in (1, -3) or size is None:
            return None
        if _name(parts) == "split" and isinstance(given, (list, tuple)):
            if not all(isinstance(width, int) for width in given):
                return None
            widths = list(given)
        elif isinstance(given, int):
            chunk = _name(parts) == "chunk"
            width = -(-size[1] // given) if chunk else given
            widths = [min(width, size[1] - at) for at in range(0, size[1], width)]
        else:
            return None
        start = sum(widths[: index % len(widths)])
    else:
        return None
    assert isinstance(source, fx.Node)
    if shape is None or size is None or len(size) != 4 or shape != (size[0], shape[1], *size[2:]):
        return None
    # A slice is a view: what is written to it, or to what it views, in place, would be seen in the other.
    if any(_is_in_place(user, traced) for viewed in (source, node, *parts.users) for user in viewed.users):
        return None
    return slice_channels, (source, start, start + shape[1])


_RESHAPES = ("view", "reshape")


def _shuffle(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """View as groups, transpose, view back."""
    chain = [node]
    while len(chain) < 5 and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    names = [str(getattr(one.target, "__name__", one.target)) for one in chain]
    if len(names) > 2 and names[1] == "contiguous":
        del chain[1], names[1]
    if len(chain) < 4 or names[0] not in _RESHAPES or names[1] != "transpose" or names[2] not in _RESHAPES:
        return None
    back, swap, split, source = chain[:4]
    if sorted((_argument(swap, 1, "dim0"), _argument(swap, 2, "dim1"))) != [1, 2]:
        return None
    groups = []
    for larger in (False, True):
        size, parts, result = (_size(one, larger) for one in (source, split, back))
        if larger and size is None:
            break  # the model takes no other size
        if size is None or parts is None or result != size or len(size) != 4 or len(parts) != 5:
            return None
        if parts[0] != size[0] or parts[3:] != size[2:] or parts[1] * parts[2] != size[1]:
            return None
        groups.append(parts[1])
    return (shuffle_channels, (source, groups[0])) if len(set(groups)) == 1 else None


def _flatten(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """View as vectors."""
    if node.op != "call_method" or node.target not in _RESHAPES:
        return None
    for larger in (False, True):
        before, after = _size(node.args[0], larger), _size(node, larger)
        if larger and before is None:
            break  # the model takes no other size
        if before is None or after is None or len(before) != 4 or after != (before[0], math.prod(before[1:])):
            return None
    return torch.flatten, (node.args[0], 1)


def _resize(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Interpolation to the size of another map, worked out from its shape."""
    if node.target is not F.interpolate:
        return None
    if _argument(node, 2, "scale_factor") is not None:
        return None
    if node.kwargs.get("antialias") or node.kwargs.get("recompute_scale_factor"):
        return None
    reference = _sized_like(_argument(node, 1, "size"))
    shape, wanted = _size(node), _size(reference)
    if shape is None or wanted is None or len(wanted) != 4 or shape[2:] != wanted[2:]:
        return None
    larger = (_size(node, True), _size(reference, True))
    if larger[0] is None or larger[1] is None or larger[0][2:] != larger[1][2:]:
        return None
    mode, corners = _argument(node, 3, "mode", "nearest"), _argument(node, 4, "align_corners")
    return resize_like, (node.args[0], reference, mode, corners)


def _sized_like(size: Any) -> fx.Node | None:
    """The map whose height and width these are: x.shape[2:], (x.shape[2], x.shape[3]) or (x.size(2), x.size(3))."""
    if isinstance(size, fx.Node):
        whole = size.target is operator.getitem and size.args[1] in (slice(2, None, None), slice(-2, None, None))
        return _shape_of_what(size.args[0]) if whole else None
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    found: list[Any] = []
    for axis, one in enumerate(size, start=2):
        if not isinstance(one, fx.Node) or len(one.args) != 2 or one.args[1] not in (axis, axis - 4):
            return None
        if one.target is operator.getitem:
            found.append(_shape_of_what(one.args[0]))
        elif one.op == "call_method" and one.target == "size":
            found.append(one.args[0])
    return found[0] if len(found) == 2 and found[0] is found[1] and isinstance(found[0], fx.Node) else None


def _shape_of_what(shape: Any) -> fx.Node | None:
    """The tensor of `x.shape` or `x.size()`."""
    if not isinstance(shape, fx.Node) or not shape.args or not isinstance(shape.args[0], fx.Node):
        return None
    is_shape = shape.target is getattr and shape.args[1] == "shape"
    is_size = shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1
    return shape.args[0] if is_shape or is_size else None
