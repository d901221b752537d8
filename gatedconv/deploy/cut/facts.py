"""What is constant: for each node, the channels whose value no input can change, and that value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import op_name, submodule
from gatedconv.convert.flow import Flow, constant_value
from gatedconv.deploy.cut.sized import depends_on_size, is_uniform, rows_of
from gatedconv.gating import FrozenGate


@dataclass(eq=False)
class Fact:
    """``known`` bool (C,): constant channels; ``value``: the node's tensor, meaningful there alone.

    ``sized`` bool (C,): constants that hold for the example's height and width alone.
    """

    known: Tensor
    value: Any
    sized: Tensor


class Facts:
    """Forward pass over a lowered graph."""

    def __init__(self, flow: Flow, channel_multiple: int = 1) -> None:
        self.flow = flow
        self.channel_multiple = channel_multiple
        self.constants: dict[fx.Node, Any] = {}
        self.facts: dict[fx.Node, Fact] = {}
        with torch.no_grad():
            for node in flow.graph_module.graph.nodes:
                if flow.has_channels(node) or flow.kind(node) == "deferred":
                    self.facts[node] = self._fact(node)

    def __getitem__(self, node: fx.Node) -> Fact:
        return self.facts[node]

    def known(self, node: fx.Node) -> Tensor:
        """Bool (C,): the constant channels of a node."""
        return self.facts[node].known

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that depends on weights alone."""
        return constant_value(self.flow.graph_module, node, self.constants)

    def values(self, node: fx.Node, index: Tensor) -> Tensor:
        """One image of the constants of some channels: (1, ...), the other dimensions 1 where uniform."""
        axis = self.flow[node].axis
        value: Tensor = self.facts[node].value[:1].index_select(axis, index)
        if bool(self.uniform(node)[index].all()):
            spread = [d for d in range(1, value.dim()) if d != axis]
            return value.amax(dim=spread, keepdim=True) if spread else value
        return value

    def uniform(self, node: fx.Node) -> Tensor:
        """Bool (C,): channels with one value everywhere."""
        fact = self.facts[node]
        if fact.value is None:
            return torch.zeros_like(fact.known)
        return is_uniform(fact.value, self.flow[node].axis)

    def zero(self, node: fx.Node) -> Tensor:
        """Bool (C,): known channels that are 0 everywhere."""
        fact = self.facts[node]
        if fact.value is None:
            return torch.zeros_like(fact.known)
        rows = rows_of(fact.value, self.flow[node].axis)
        return fact.known & (rows == 0).all(dim=1)

    def _fact(self, node: fx.Node) -> Fact:
        kind = self.flow.kind(node)
        if kind == "gate":
            return self._gate(node)
        if kind == "deferred":
            value = self._value(node, self.facts[self.flow[node].source].known.any())  # type: ignore[index]
            nothing = torch.zeros(0, dtype=torch.bool)
            return Fact(nothing, value, nothing)
        known = self._known(node)
        if not known.any():
            return Fact(known, None, known)
        value = self._value(node, True)
        if not bool(known.all()) and kind in ("channelwise", "conv", "regroup", "binary"):
            known = known & is_uniform(value, self.flow[node].axis)
        sized = depends_on_size(self, node, known, value)
        return Fact(self._rounded(node, known), value, sized)

    def _gate(self, node: fx.Node) -> Fact:
        module = submodule(node)
        value = node.meta["val"]
        nothing = torch.zeros(value.shape[1], dtype=torch.bool)
        if not isinstance(module, FrozenGate):
            return Fact(nothing, None, nothing)
        mask = module.mask.to(value.dtype).cpu()
        return Fact(~nothing, mask.expand(value.shape[0], -1), nothing)

    def _known(self, node: fx.Node) -> Tensor:
        flow, channels = self.flow, self.flow[node]
        nothing = torch.zeros(channels.size, dtype=torch.bool)
        if channels.kind == "move":
            return self.known(channels.source)[channels.index]  # type: ignore[arg-type,index]
        if channels.kind == "channelwise":
            return self.known(self.source(node)).clone()
        if channels.kind == "binary":
            return self._binary(node, channels.size)
        if channels.kind == "cat":
            parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
            return torch.cat([self.known(p) for p in parts])
        if channels.kind == "conv":
            source = self.source(node)
            weight = self.weight(node)
            groups = flow[source].size // weight.shape[1]
            return self.known(source).reshape(groups, -1).all(dim=1).repeat_interleave(channels.size // groups)
        if channels.kind == "regroup":
            source = self.source(node)
            return self.known(source).reshape(channels.size, -1).all(dim=1)
        if channels.kind in ("linear", "mix", "opaque") and node.op != "placeholder":
            inputs = node.all_input_nodes
            usable = all(flow.has_channels(n) or flow.kind(n) == "constant" for n in inputs)
            if usable and all(bool(self.known(n).all()) for n in inputs if flow.has_channels(n)):
                return ~nothing
        return nothing

    def _binary(self, node: fx.Node, size: int) -> Tensor:
        known, zero = [], []
        for operand in node.args[:2]:
            if self.flow.has_channels(operand):
                known.append(self.known(operand).expand(size))  # type: ignore[arg-type]
                zero.append(self.zero(operand).expand(size))  # type: ignore[arg-type]
            else:
                known.append(torch.ones(size, dtype=torch.bool))
                zero.append(torch.zeros(size, dtype=torch.bool))
        both = known[0] & known[1]
        return both | zero[0] | zero[1] if op_name(node) == "mul" else both

    def _value(self, node: fx.Node, wanted: Any) -> Any:
        """The node's operation on inputs whose unknown channels are 0."""
        if not bool(wanted):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._operand)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.flow.graph_module.get_submodule(str(node.target))(*args, **kwargs)

    def _operand(self, node: fx.Node) -> Any:
        if self.flow.kind(node) == "constant":
            return self.constant(node)
        fact = self.facts.get(node)
        if fact is None:
            return node.meta["val"]  # a size
        if self.flow.kind(node) == "deferred":
            return fact.value
        example = node.meta["val"]
        if fact.value is None:
            return torch.zeros(example.shape, dtype=example.dtype)
        axis = self.flow[node].axis
        shape = [-1 if d == axis else 1 for d in range(example.dim())]
        return torch.where(fact.known.reshape(shape), fact.value, torch.zeros((), dtype=example.dtype))

    def _rounded(self, node: fx.Node, known: Tensor) -> Tensor:
        """Call some closed channels unknown, so that a multiple of ``channel_multiple`` stays."""
        if self.channel_multiple == 1 or not is_gating(self.flow, node):
            return known
        open_count = int((~known).sum())
        surplus = -open_count % self.channel_multiple
        if open_count:
            known = known.clone()
            known[known.nonzero().flatten()[:surplus]] = False
        return known

    def source(self, node: fx.Node) -> fx.Node:
        """The (first) input that has channels."""
        return next(n for n in node.all_input_nodes if self.flow.has_channels(n))

    def weight(self, node: fx.Node) -> Tensor:
        """The weight of a convolution or linear node."""
        module = submodule(node)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return module.weight
        weight: Any = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        return self.constant(weight)  # type: ignore[no-any-return]


def is_gating(flow: Flow, node: fx.Node) -> bool:
    """Whether the node multiplies a tensor by a gate's decision."""
    if flow.kind(node) != "binary" or op_name(node) != "mul":
        return False
    return any(isinstance(o, fx.Node) and _is_decision(flow, o) for o in node.args[:2])


def _is_decision(flow: Flow, node: fx.Node) -> bool:
    while flow.kind(node) == "move" and flow[node].source is not None:
        node = flow[node].source  # type: ignore[assignment]
    return flow.kind(node) == "gate"
