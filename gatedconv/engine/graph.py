"""Traces a model into a graph of values: nothing in place, no layers without effect, shapes on every node."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.nn import ChannelBias, ConstantMap, Conv2d, GatherChannels, PadShortcut, ScatterAdd

_LEAVES = (ChannelBias, ConstantMap, Conv2d, GatherChannels, PadShortcut, ScatterAdd)
_IN_PLACE_FUNCTIONS = {operator.iadd, torch.relu_}
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout2d)


class ConstantMaps(ConstantMap):
    """A constant map for every image instead of one for all, so that it is a map like any other in a plan."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, ceil(H / stride), ceil(W / stride))."""
        return super().forward(x).expand(x.shape[0], -1, -1, -1)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat the modules that a plan knows as one node each."""
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """Return a traced eval copy of `model`, with shapes for two images of example_input's size on its nodes.

    Raises:
        Exception: Whatever tracing or the trial run raises: the model is not traceable.
    """
    source = copy.deepcopy(model).eval()
    for name, module in list(source.named_modules()):
        if type(module) is ConstantMap and name and example_input.device.type == "cpu":  # CPU plans know them
            maps = ConstantMaps(module.value.detach(), module.stride).requires_grad_(False)
            source.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], maps)
    if not is_plain(source) or len(inspect.signature(source.forward).parameters) != 1:
        # A tracer calls a root's forward without its hooks, and takes its defaults for inputs; a child it calls.
        source = nn.Sequential(source)
    graph = _Tracer().trace(source)
    traced = fx.GraphModule(source, graph, type(model).__name__)
    _drop_nothing(traced)
    _make_functional(traced)
    traced.graph.lint()
    traced.recompile()
    _, channels, height, width = example_input.shape
    with torch.no_grad():
        # Not zeros: a model may divide by what it sees.
        _Shapes(traced).run(torch.full((2, channels, height, width), 0.5, dtype=torch.float32, device="cpu"))
    _note_larger_shapes(traced, (2, channels, 4 * height, 4 * width))
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
        if isinstance(module, _NOTHING_IN_EVAL) and is_plain(module):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _make_functional(traced: fx.GraphModule) -> None:
    """Let every later reader of a tensor that is written in place read the writer's result."""
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if _is_in_place(node, traced) and isinstance(node.args[0], fx.Node):
            written = node.args[0]
            written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023


def _is_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_function":
        return node.target in _IN_PLACE_FUNCTIONS or bool(node.kwargs.get("inplace", False))
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
