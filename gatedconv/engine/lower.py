"""A model as a graph of values with their shapes: constants are computed, and idioms are one call each."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from gatedconv.convert.record import record
from gatedconv.deploy.graph import write_graph
from gatedconv.deploy.graph_writer import NoGraph
from gatedconv.engine.idioms import join_idioms
from gatedconv.engine.layers import size_of
from gatedconv.engine.transposed import split_transposed
from gatedconv.nn import ConstantMap, EmptyMap, FrozenConv2d, GatherChannels, PadShortcut, ScatterAdd, ScatterChannels


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
    """The constants, one for each channel, that a module makes of any input; None for other modules."""
    if type(module) is ConstantMap:
        stride = (module.stride, module.stride)
        return ConstantMaps(module.value.detach(), EmptyMap(0, (1, 1), stride, (0, 0), (1, 1)))
    if type(module) is EmptyMap and module.channels:
        return ConstantMaps(torch.zeros(module.channels, device="cpu"), module)
    return None


# What stays a module: ours, recurrent layers, whose operations are as many as there are steps, and linear layers, whose
# operations depend on the strides of what they read.
_LEAVES = (
    *(ConstantMap, ConstantMaps, EmptyMap, FrozenConv2d, GatherChannels, PadShortcut, ScatterAdd, ScatterChannels),
    *(nn.GRU, nn.LSTM, nn.Linear, nn.RNN),
)


def lower(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """Return the graph of an eval copy of `model`, with shapes for two images of example_input's size on its nodes.

    Its attribute `fixed_size` is the only (C, H, W) that the graph is right for, None where that is any.

    Raises:
        NoGraph: The model cannot be written as a graph.
    """
    source = copy.deepcopy(model)
    source.eval()
    for name, module in list(source.named_modules()):
        maps = _constant_maps(module) if name and example_input.device.type == "cpu" else None  # CPU plans take them
        if maps is not None:
            source.set_submodule(name, maps)
    if example_input.dtype != torch.float32:
        _require_one_dtype(source, example_input)
    written = write_graph(source, tuple(example_input.shape), leaves=_LEAVES, check=False)
    traced = fx.GraphModule(written, written.graph, type(model).__name__)
    vars(traced)["fixed_size"] = vars(written).get("fixed_size")
    _fold_constants(traced)
    _keep_classes(traced.graph, vars(written)["returned"])
    traced.graph.lint()
    join_idioms(traced)
    if example_input.device.type == "cpu":
        split_transposed(traced)
        _fill_empty_maps(traced)
    else:
        _move(traced.graph, example_input.device)
    return traced


def _require_one_dtype(model: nn.Module, example_input: Tensor) -> None:
    """NoGraph if a model's code names dtypes or converts between them: its graph is written in float32.

    Found from two runs on the meta device; a model that does not run there is taken to do neither.
    """
    ways = []
    for dtype in (torch.float32, example_input.dtype):
        images = torch.empty(2, *example_input.shape[1:], dtype=dtype, device="meta")
        try:
            found = record(copy.deepcopy(model).to("meta", dtype), (images,), known=lambda module: False)
        except Exception:  # code or operations that need numbers
            return
        ways.append(
            [
                (
                    node.op,
                    [value.tensor.dtype == dtype for value in node.outputs if value.users],
                    _dtypes((node.args, node.kwargs)),
                )
                for node in found.nodes
            ]
        )
    if ways[0] != ways[1]:
        raise NoGraph(f"its code names or converts dtypes, and would compute otherwise in {example_input.dtype}")


def _dtypes(arguments: Any) -> list[torch.dtype]:
    return [item for item in tree_flatten(arguments)[0] if isinstance(item, torch.dtype)]


def _move(graph: fx.Graph, device: torch.device) -> None:
    """Let a graph that was recorded on the CPU make its tensors on another device.

    Raises:
        NoGraph: an operation runs on the CPU alone.
    """

    def there(item: Any) -> Any:
        return device if isinstance(item, torch.device) else item

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, there)
        node.kwargs = fx.node.map_aggregate(node.kwargs, there)
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        if name and not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, device.type.upper()):
            raise NoGraph(f"{name} does not run on {device.type}")


def _fold_constants(traced: fx.GraphModule) -> None:
    """Compute what depends on the model's own tensors alone, such as standardized weights."""
    values: dict[fx.Node, Any] = {}
    for node in list(traced.graph.nodes):
        if node.op == "get_attr":
            values[node] = attrgetter(str(node.target))(traced)
        reads = node.all_input_nodes
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or not reads or is_random or not all(read in values for read in reads):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            value = values[node] = node.target(*args, **kwargs)
        if isinstance(value, Tensor):
            name = f"constant_{node.name}"
            traced.register_buffer(name, value.detach().clone(), persistent=False)
            with traced.graph.inserting_before(node):
                constant = traced.graph.get_attr(name)
            constant.meta.update(node.meta)
            values[constant] = value
            node.replace_all_uses_with(constant)
            traced.graph.erase_node(node)


def _keep_classes(graph: fx.Graph, returned: Any) -> None:
    """Let a graph, which returns tuples, lists and dicts, return the named tuples and dataclasses of its model."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        output.args = (_as_returned(graph, returned, output.args[0]),)


def _as_returned(graph: fx.Graph, returned: Any, part: Any) -> Any:
    if isinstance(returned, (tuple, list)):
        listed = [_as_returned(graph, *each) for each in zip(returned, part, strict=True)]
        if isinstance(returned, list):
            return listed
        return graph.call_function(type(returned), tuple(listed)) if hasattr(returned, "_fields") else tuple(listed)
    if not isinstance(part, dict):
        return part
    keyed = returned if isinstance(returned, Mapping) else vars(returned)
    named = {key: _as_returned(graph, keyed[key], value) for key, value in part.items()}
    if dataclasses.is_dataclass(returned):
        return graph.call_function(type(returned), (), named)
    if isinstance(returned, dict):
        return named
    raise NoGraph(f"it returns a {type(returned).__name__}")


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
