"""The MACs of a gated graph piece by piece, by fvcore's rules, each with the gates that scale it.

A channel's *label* is the gate decision that makes it a constant, on its way forward, or useless, on its
way back: a convolution between labelled inputs and labelled outputs costs in proportion to both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import op_name, submodule
from gatedconv.convert.flow import MIXING_NORMS, NORMS, Flow
from gatedconv.convert.trace import TRACED_BATCH
from gatedconv.gating import Gate, MacTerm
from gatedconv.nn import AddBranch, SelectOpen

ALWAYS, UNUSED = -1, -2  # labels of channels that no gate closes, and of channels that nobody reads
_PASSING = ("channelwise", "select", "binary", "branch", "cat", "move")
_SHIFT = 1 << 20  # a label is gate number * _SHIFT + channel number


def graph_mac_terms(flow: Flow, gates: Mapping[str, object]) -> list[MacTerm]:
    """Terms for one image, one for each combination of gates; the gates' own layers are not part of them."""
    macs: dict[tuple[Any, Any], float] = {}
    params: dict[tuple[Any, Any], int] = {}
    for term in _Labels(flow, list(gates)).terms():
        key = (term.gates, term.channels)
        macs[key] = macs.get(key, 0.0) + term.macs
        params[key] = params.get(key, 0) + term.params
    return [MacTerm(macs[key], params[key], *key) for key in macs]


def reachable_share(terms: Sequence[MacTerm]) -> float:
    """0 to 1: the share of MACs that at least one gate scales."""
    total = math.fsum(t.macs for t in terms)
    return math.fsum(t.macs for t in terms if t.gates) / total if total else 0.0


class _Labels:
    def __init__(self, flow: Flow, gates: list[str]) -> None:
        self.flow = flow
        self.gates = gates
        self.nodes: list[fx.Node] = list(flow.graph_module.graph.nodes)
        self.forward: dict[fx.Node, Tensor] = {}
        self.needed: dict[fx.Node, Tensor] = {}
        for node in self.nodes:
            if flow.has_channels(node):
                self.forward[node] = self._label(node)
        for node in reversed(self.nodes):
            self._spread_need(node)
        self.layers = self._layer_gates()

    # -- which gate closes a channel ---------------------------------------------------------------

    def _label(self, node: fx.Node) -> Tensor:
        channels = self.flow[node]
        always = torch.full((channels.size,), ALWAYS)
        if channels.kind == "gate" and str(node.target) in self.gates and channels.size > 1:
            return self.gates.index(str(node.target)) * _SHIFT + torch.arange(channels.size)
        if channels.kind in ("channelwise", "select"):
            return self.forward[self._source(node)]
        if channels.kind == "move":
            return self.forward[channels.source][channels.index]  # type: ignore[index]
        if channels.kind == "cat":
            return self._cat(node)
        if channels.kind == "binary":
            return self._binary(node, always)
        if channels.kind == "conv" and _is_depthwise(node):
            source = self.forward[self._source(node)]
            return source.repeat_interleave(channels.size // len(source))
        return always

    def _cat(self, node: fx.Node) -> Tensor:
        parts = node.args[0] if node.args else node.kwargs["tensors"]
        return torch.cat([self.forward[p] for p in parts])  # type: ignore[union-attr,index]

    def _binary(self, node: fx.Node, always: Tensor) -> Tensor:
        operands = [self.forward[o] for o in node.args[:2] if self.flow.has_channels(o)]  # type: ignore[index]
        labels = [o.expand(len(always)) for o in operands if len(o) in (1, len(always))]
        if op_name(node) == "mul":
            result = always
            for label in labels:
                result = torch.where(label >= 0, label, result)
            return result
        if len(labels) == 2:
            return torch.where(labels[0] == labels[1], labels[0], always)
        return labels[0] if all(map(_is_uniform, node.args[:2])) else always

    # -- which gate makes a channel useless ----------------------------------------------------------

    def _spread_need(self, node: fx.Node) -> None:
        flow = self.flow
        kind = flow.kind(node)
        mine = self.needed.get(node)
        if flow.has_channels(node) and mine is None:
            mine = self.needed[node] = torch.full((flow[node].size,), UNUSED)
        if kind in _PASSING or (kind == "conv" and _is_depthwise(node)):
            assert mine is not None
            need = self._effective(node)
            if kind == "cat":
                parts = node.args[0] if node.args else node.kwargs["tensors"]
                for part, piece in zip(parts, need.split([flow[p].size for p in parts]), strict=True):  # type: ignore
                    self._add(part, piece)
            elif kind == "move":
                self._add(flow[node].source, need, flow[node].index)  # type: ignore[arg-type]
            elif kind == "conv":
                source = self._source(node)
                self._add(source, need, torch.arange(flow[node].size) // (flow[node].size // flow[source].size))
            else:
                for source in _readers_of_channels(node, kind) or [self._source(node)]:
                    if flow.has_channels(source):
                        wide = flow[source].size == len(need)
                        self._add(source, need if wide else torch.full((flow[source].size,), ALWAYS))
            return
        if kind != "gate":  # a frozen gate reads nothing
            for source in node.all_input_nodes:
                self._add_all(source)

    def _add_all(self, source: fx.Node) -> None:
        if self.flow.has_channels(source):
            self._add(source, torch.full((self.flow[source].size,), ALWAYS))
        elif self.flow.kind(source) == "deferred":
            self._add_all(self.flow[source].source)  # type: ignore[arg-type]

    def _add(self, source: fx.Node, need: Tensor, index: Tensor | None = None) -> None:
        have = self.needed.get(source)
        if have is None:
            have = torch.full((self.flow[source].size,), UNUSED)
        if index is None:
            self.needed[source] = _merge(have, need)
            return
        used = need != UNUSED
        low, high = (
            torch.full_like(have, UNUSED).scatter_reduce(0, index[used], need[used], how, include_self=False)
            for how in ("amin", "amax")
        )
        self.needed[source] = _merge(have, torch.where(low == high, low, ALWAYS))

    def _effective(self, node: fx.Node) -> Tensor:
        """The label by which a node's channels cost: its own, else its readers'."""
        return torch.where(self.forward[node] >= 0, self.forward[node], self.needed[node])

    # -- layer gates ------------------------------------------------------------------------------------

    def _layer_gates(self) -> dict[fx.Node, tuple[str, ...]]:
        """For each node the gates of the branches that it is in."""
        found: dict[fx.Node, tuple[str, ...]] = {}
        for node in self.nodes:
            if not isinstance(submodule(node), AddBranch):
                continue
            part, gate = node.args[1], node.args[2]
            inside, queue = {part}, [part]
            while queue:
                for source in queue.pop().all_input_nodes:  # type: ignore[union-attr]
                    selects = isinstance(submodule(source), SelectOpen) and source.args[1] is gate
                    if source not in inside and not selects and source is not gate and set(source.users) <= inside:
                        inside.add(source)
                        queue.append(source)
            for member in inside:
                found[member] = (*found.get(member, ()), str(gate.target))  # type: ignore
        return found

    # -- terms ------------------------------------------------------------------------------------------

    def terms(self) -> list[MacTerm]:
        """One term for each piece of work and pair of gates."""
        return [term for node in self.nodes for term in self._terms_of(node)]

    def _terms_of(self, node: fx.Node) -> list[MacTerm]:
        module = submodule(node)
        if isinstance(module, Gate):
            return []
        layer = self.layers.get(node, ())
        params = sum(p.numel() for p in module.parameters()) if module is not None else 0
        kind, value = self.flow.kind(node), node.meta.get("val")
        if kind in ("conv", "linear"):
            return self._dense(node, params, layer)
        if isinstance(value, Tensor) and kind == "channelwise":
            per_element = _per_element(node)
            if per_element or params:
                counted = self._source(node).meta["val"] if _is_pool(node) else value
                return self._by_channel(node, per_element * counted.numel() / counted.shape[0], params, layer)
        macs = _other_macs(node)
        return [MacTerm(macs, params, layer)] if macs or params else []

    def _dense(self, node: fx.Node, params: int, layer: tuple[str, ...]) -> list[MacTerm]:
        source, value = self._source(node), node.meta["val"]
        weight = self._weight(node)
        groups = self.flow[source].size // weight.shape[1]
        total = float(weight.numel() * value.numel() // value.shape[0] // weight.shape[0])
        incoming, outgoing = self.forward[source], self._effective(node)
        outgoing = torch.where(outgoing == UNUSED, ALWAYS, outgoing)
        if _is_depthwise(node):
            return self._by_channel(node, total, params, layer)
        terms = []
        inputs, outputs = incoming.reshape(groups, -1), outgoing.reshape(groups, -1)
        for gate_in in (inputs.div(_SHIFT, rounding_mode="floor")).unique().tolist():
            rows = inputs.div(_SHIFT, rounding_mode="floor") == gate_in
            for gate_out in (outputs.div(_SHIFT, rounding_mode="floor")).unique().tolist():
                columns = outputs.div(_SHIFT, rounding_mode="floor") == gate_out
                share = float((rows.sum(1) * columns.sum(1)).sum()) / (rows.shape[1] * outputs.numel())
                if share:
                    scaled = [self._named(inputs[rows], gate_in), self._named(outputs[columns], gate_out)]
                    terms.append(_term(total * share, round(params * share), layer, scaled))
        return terms

    def _by_channel(self, node: fx.Node, macs: float, params: int, layer: tuple[str, ...]) -> list[MacTerm]:
        labels = self._effective(node)
        labels = torch.where(labels == UNUSED, ALWAYS, labels)
        numbers = labels.div(_SHIFT, rounding_mode="floor")
        terms = []
        for number in numbers.unique().tolist():
            share = float((numbers == number).float().mean())
            terms.append(
                _term(
                    macs * share,
                    round(params * share),
                    layer,
                    [self._named(labels[numbers == number], number)],
                )
            )
        return terms

    def _named(self, labels: Tensor, number: int) -> tuple[str, tuple[int, ...] | None] | None:
        """The gate of these labels and which of its channels they are; None for all of them."""
        if number < 0:
            return None
        name = self.gates[number]
        gate = self.flow.graph_module.get_submodule(name)
        channels = (labels % _SHIFT).unique().tolist()
        return name, (None if len(channels) == gate.num_gates else tuple(channels))

    def _source(self, node: fx.Node) -> fx.Node:
        return next(n for n in node.all_input_nodes if self.flow.has_channels(n))

    def _weight(self, node: fx.Node) -> Tensor:
        module = submodule(node)
        if module is not None:
            return module.weight  # type: ignore[return-value]
        return node.args[1].meta["val"] if len(node.args) > 1 else node.kwargs["weight"].meta["val"]  # type: ignore


def _is_uniform(operand: Any) -> bool:
    """Whether an operand, if it is a constant, has at most one number for each channel."""
    value = operand.meta.get("val") if isinstance(operand, fx.Node) and operand.op == "get_attr" else None
    return not isinstance(value, Tensor) or value.numel() == max(value.shape, default=1)


def _readers_of_channels(node: fx.Node, kind: str) -> list[fx.Node]:
    """Inputs of a node of two operands that it reads channel by channel; of other nodes none."""
    if kind == "branch":
        return [n for n in node.args[:2] if isinstance(n, fx.Node)]
    return node.all_input_nodes if kind == "binary" else []


def _term(
    macs: float, params: int, layer: tuple[str, ...], scaled: list[tuple[str, tuple[int, ...] | None] | None]
) -> MacTerm:
    named = [s for s in scaled if s is not None]
    gates = (*layer, *(name for name, _ in named))
    channels = (*[None] * len(layer), *(which for _, which in named))
    return MacTerm(macs, params, gates, channels if any(c is not None for c in channels) else ())


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Needed by both: by nobody else if one is UNUSED, under one gate if they agree, else always."""
    always = torch.full((), ALWAYS)
    return torch.where(a == UNUSED, b, torch.where((b == UNUSED) | (a == b), a, always))


def _is_depthwise(node: fx.Node) -> bool:
    module = submodule(node)
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels and module.groups > 1
    return False


def _per_element(node: fx.Node) -> int:
    """Operations per element of the output, of the input in a pool, that fvcore counts for a channelwise node."""
    module = submodule(node)
    if isinstance(module, NORMS):
        affine = module.weight is not None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            return 2 if affine else 1
        return 5 if affine else 4
    return 1 if _is_pool(node) else {"nearest": 1, "bilinear": 4}.get(_upsampling(node), 0)


def _is_pool(node: fx.Node) -> bool:
    module = submodule(node)
    return isinstance(module, nn.AdaptiveAvgPool2d) or (module is None and op_name(node) == "adaptive_avg_pool2d")


def _upsampling(node: fx.Node) -> str:
    """The mode of an interpolation, "" for any other node."""
    module = submodule(node)
    if module is not None:
        return module.mode if isinstance(module, nn.Upsample) else ""
    name = op_name(node)
    if name == "interpolate":
        return str(node.args[3] if len(node.args) > 3 else node.kwargs.get("mode", "nearest"))
    return name.removeprefix("upsample_").removesuffix("2d") if name.startswith("upsample_") else ""


def _einsum_macs(equation: str, shapes: list[tuple[int, ...]]) -> float:
    """MACs per image of a product of two tensors, one multiplication for each combination of indices."""
    operands = equation.replace(" ", "").split("->")[0].split(",")
    if len(operands) != 2 or [len(o) for o in operands] != [len(s) for s in shapes]:
        return 0.0
    sizes = {
        letter: size
        for operand, shape in zip(operands, shapes, strict=True)
        for letter, size in zip(operand, shape, strict=True)
    }
    return math.prod(sizes.values()) / TRACED_BATCH


def _other_macs(node: fx.Node) -> float:
    """MACs per image of work that is not tracked by channels."""
    module, value = submodule(node), node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return 0.0
    sources = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.weight.numel() * math.prod(sources[0].shape[2:])
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.weight.numel() * math.prod(value.shape[2:])
    if isinstance(module, nn.Linear):
        return module.weight.numel() * value.numel() / TRACED_BATCH / module.out_features
    if isinstance(module, MIXING_NORMS):
        return (5 if getattr(module, "weight", None) is not None else 4) * value.numel() / TRACED_BATCH
    if node.op == "call_function" and op_name(node) == "einsum" and isinstance(node.args[0], str):
        return _einsum_macs(node.args[0], [tuple(source.shape) for source in sources])
    if module is None and node.op != "get_attr" and op_name(node) in ("matmul", "bmm", "mm") and len(sources) == 2:
        return value.numel() / TRACED_BATCH * sources[0].shape[-1]
    return 0.0
