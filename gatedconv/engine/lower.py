"""Traces a model into a graph of values: nothing in place, no layers without effect, idioms as one call, shapes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.engine.idioms import argument_of, is_in_place, join_idioms, name_of, size_of
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
    if name_of(node) == "chunk":
        parts = argument_of(node, 1, "chunks")
        return parts if isinstance(parts, int) else 0
    sizes = argument_of(node, 1, "split_size") if name_of(node) == "split" else 0
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
    join_idioms(traced)
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
        if is_in_place(node, traced) and isinstance(node.args[0], fx.Node):
            written = node.args[0]
            written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023


def _fold_constants(traced: fx.GraphModule) -> None:
    """Compute what depends on the model's own tensors alone, such as standardized weights."""
    for node in list(traced.graph.nodes):
        reads = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not reads or is_in_place(node, traced):
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


def _fill_empty_maps(traced: fx.GraphModule) -> None:
    """Write constants that are scattered into a map without channels as constants of its size."""
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is not ScatterChannels or module.axis != 1 or module.index.numel() or size_of(node) is None:
            continue
        source, window = node.args[0], EmptyMap(0, (1, 1), (1, 1), (0, 0), (1, 1))
        while isinstance(source, fx.Node) and (size_of(source) or (0, 1))[1] == 0:
            maker = traced.get_submodule(str(source.target)) if source.op == "call_module" else None
            if type(maker) is EmptyMap:
                source, window = source.args[0], maker
                break
            source = source.args[0] if type(maker) is GatherChannels and maker.axis == 1 else None
        if not isinstance(source, fx.Node) or len(size_of(source) or ()) != 4:
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
