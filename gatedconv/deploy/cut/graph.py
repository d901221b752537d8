"""The general cut: lower, find constants, find what is needed, write the rest again."""

from __future__ import annotations

from torch import Tensor, fx, nn

from gatedconv.convert.canonical import op_name, settle_inplace, submodule
from gatedconv.convert.flow import Flow
from gatedconv.convert.frozen import settle_branches
from gatedconv.convert.trace import evaluate_shapes, is_random_drop
from gatedconv.deploy.cut.demand import Demand
from gatedconv.deploy.cut.emit import Emitter
from gatedconv.deploy.cut.facts import Facts
from gatedconv.deploy.cut.layers import fold_scale
from gatedconv.deploy.cut.rules import RULES
from gatedconv.nn import GraphNet, StochasticDepth


def cut_graph(graph_module: fx.GraphModule, example_input: Tensor, channel_multiple: int, name: str) -> GraphNet:
    """The smaller graph of a canonical one with frozen gates, which is changed on the way (eval mode, CPU).

    Args:
        graph_module: with frozen gates as modules that its graph calls.
        example_input: (N, C, H, W) that it accepts.
        channel_multiple: gates leave a multiple of this many channels, as far as there are any.
        name: of the result's class.
    """
    _drop_noise(graph_module)
    settle_branches(graph_module)
    evaluate_shapes(graph_module, example_input)
    flow = Flow(graph_module)
    facts = Facts(flow, channel_multiple)
    emitter = Emitter(flow, facts, Demand(flow, facts))
    small = emitter.run(RULES)
    _fold_scales(small)
    small.graph.eliminate_dead_code()
    result = GraphNet(small, small.graph, name)
    settle_inplace(result)
    result.recompile()
    if emitter.is_sized:
        vars(result)["fixed_size"] = tuple(example_input.shape[2:])
    return result


def _drop_noise(graph_module: fx.GraphModule) -> None:
    """Layers with code of their own that do nothing in eval: a cut model has to load without that code."""
    for node in list(graph_module.graph.nodes):
        module = submodule(node)
        if module is not None and not isinstance(module, StochasticDepth) and is_random_drop(module):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph_module.graph.erase_node(node)


def _fold_scales(graph_module: fx.GraphModule) -> None:
    """Masks that rounding left behind move into the layer in front of them."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or op_name(node) != "mul" or len(node.args) != 2:
            continue
        value, scale = node.args
        if not (isinstance(value, fx.Node) and isinstance(scale, fx.Node) and scale.op == "get_attr"):
            continue
        vector = _attribute(graph_module, str(scale.target))
        module = submodule(value)
        called = sum(n.target == value.target for n in graph_module.graph.nodes if n.op == "call_module")
        if isinstance(vector, nn.Parameter) or module is None or len(value.users) > 1 or called > 1:
            continue
        if vector.numel() == vector.shape[0] and fold_scale(module, vector.flatten()):
            node.replace_all_uses_with(value)
            graph_module.graph.erase_node(node)


def _attribute(root: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(root.get_submodule(owner), name)
    return value
