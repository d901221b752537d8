"""A frozen graph computes nothing that is closed: branches go, convolutions skip their closed channels."""

from __future__ import annotations

import torch
from torch import fx, nn

from gatedconv.convert.canonical import op_name, set_module, submodule
from gatedconv.convert.computed import has_own_hooks
from gatedconv.gating import FrozenGate, find_gates
from gatedconv.nn import AddBranch, FrozenConv2d, GraphNet, SelectOpen


def settle_frozen(model: GraphNet) -> None:
    """Rewrite a graph whose gates are all frozen, in place; its gates stay its submodules."""
    settle_branches(model)
    for node in model.graph.nodes:
        _skip_closed(model, node)
    gates = find_gates(model)
    model.delete_all_unused_submodules()
    for name in gates.keys() - find_gates(model).keys():
        set_module(model, name, gates[name])
    model.recompile()


def settle_branches(model: fx.GraphModule) -> None:
    """Leave closed branches out, make plain sums of open ones."""
    graph = model.graph
    for node in list(graph.nodes):
        module = submodule(node)
        if isinstance(module, SelectOpen):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
        elif isinstance(module, AddBranch):
            shortcut, part, decision = node.args
            gate = submodule(decision)  # type: ignore[arg-type]
            if isinstance(gate, FrozenGate) and not gate.is_open:
                node.replace_all_uses_with(shortcut)  # type: ignore[arg-type]
                graph.erase_node(node)
            else:
                node.op, node.target, node.args = "call_function", torch.add, (shortcut, part)
    graph.eliminate_dead_code()
    model.recompile()


def _skip_closed(model: GraphNet, product: fx.Node) -> None:
    """The convolution in front of ``value * decision``, or of the norm in front of it, gets the mask."""
    if product.op != "call_function" or op_name(product) != "mul" or len(product.args) != 2:
        return
    value, factor = product.args
    if not isinstance(value, fx.Node) or not isinstance(factor, fx.Node) or op_name(factor) != "getitem":
        return
    gate = submodule(factor.args[0]) if isinstance(factor.args[0], fx.Node) else None
    if not isinstance(gate, FrozenGate) or gate.is_full:
        return
    if isinstance(submodule(value), nn.modules.batchnorm._BatchNorm) and set(value.users) <= {
        product,
        factor.args[0],
    }:
        value = value.args[0]
    if not isinstance(value, fx.Node):
        return
    conv = submodule(value)
    if not isinstance(conv, nn.Conv2d) or type(conv) is not nn.Conv2d:
        return
    if "weight" not in conv._parameters or has_own_hooks(conv):
        return
    readers = {u for u in value.users if not isinstance(submodule(u), FrozenGate)}
    calls = sum(n.op == "call_module" and n.target == value.target for n in model.graph.nodes)
    if len(readers) == 1 and calls == 1 and conv.out_channels == gate.num_gates:
        set_module(model, str(value.target), FrozenConv2d(conv, gate.mask.clone()).train(conv.training))
