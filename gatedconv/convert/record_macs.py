"""The MACs of a recorded run piece by piece, by fvcore's rules, each with the gates that scale it.

A label names the gates any of which makes a channel constant (forward pass) or unused (backward pass) when it closes: a
convolution between labeled inputs and labeled outputs costs in proportion to both. Where that is an estimate, the trial
of mac_trial.py finds it out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gatedconv.convert.channels import Sliceable
from gatedconv.convert.constants import Constants, Masks, is_padded
from gatedconv.convert.flow import MIXING_NORMS, NORMS, Flow, op_name
from gatedconv.convert.install import over_channels
from gatedconv.convert.module_kinds import groups_of, has_numbers, is_depthwise
from gatedconv.convert.record import CALL, Node, Value
from gatedconv.gating import MacTerm
from gatedconv.gating.mac_terms import Factor, dense_macs, norm_operations

ALWAYS, UNUSED = -1, -2  # labels of channels that no gate closes, and of channels that are not read
_SHIFT = 1 << 20  # a label is the number of a gate, or of a set of gates, * _SHIFT + the number of a channel in it
_MOST_GATES = 3  # in a label; more would make a term for almost every channel
_PASSING = ("elementwise", "group_norm", "cat", "move")


@dataclass
class GatePlaces:
    """The places where gates multiply.

    ``values`` and, at one reader alone, ``inputs``: -> (gate path, number of gates); ``layers``: node -> paths of the
    layer gates that it runs under; ``ends``: last value of each branch with a layer gate -> the gate's path.
    """

    values: Mapping[Value, tuple[str, int]]
    inputs: Mapping[tuple[Node, Value], tuple[str, int]]
    layers: Mapping[Node, tuple[str, ...]]
    ends: Mapping[Value, str] = field(default_factory=dict)


def node_terms(flow: Flow, gated: GatePlaces) -> dict[Node, list[MacTerm]]:
    """Terms for one image: for each operation one for each combination of gates; those of the gates are left out."""
    return _Labels(flow, gated).terms()


def merge_terms(found: Iterable[MacTerm], total: float | None) -> list[MacTerm]:
    """One term for each combination of gates.

    Args:
        found: terms of the operations.
        total: MACs of the model by ``count_macs``; what no term explains of them runs always. None: unknown.
    """
    macs: dict[tuple[object, object], float] = {}
    params: dict[tuple[object, object], int] = {}
    found = list(found)
    rest = 0.0 if total is None else total - math.fsum(term.macs for term in found)
    for term in [*found, MacTerm(rest)] if abs(rest) >= 0.5 else found:
        key = (term.gates, term.channels)
        macs[key] = macs.get(key, 0.0) + term.macs
        params[key] = params.get(key, 0) + term.params
    return [MacTerm(macs[key], params[key], *key) for key in macs]  # type: ignore[arg-type]


def reachable_share(terms: Sequence[MacTerm]) -> float:
    """0 to 1: the share of MACs that at least one gate scales."""
    total = math.fsum(t.macs for t in terms)
    return math.fsum(t.macs for t in terms if t.gates) / total if total else 0.0


class _Labels:
    def __init__(self, flow: Flow, gated: GatePlaces) -> None:
        self.flow = flow
        self.gated = gated
        self.sizes = dict((*gated.values.values(), *gated.inputs.values()))
        self.gates: list[tuple[str, ...]] = [(name,) for name in self.sizes]
        self.first = {name: number * _SHIFT for number, (name,) in enumerate(self.gates)}
        self.next = [number * _SHIFT for number in range(len(self.gates))]  # the next label for a set of gates
        self.parts: dict[int, tuple[int, ...]] = {}  # label of several gates -> their labels
        self.joined: dict[tuple[int, ...], int] = {}  # and the other way round
        self.images = _images_of(flow)
        self.whole: set[Value] = set()  # keep all channels, regardless of later gates
        self.closed = Constants(flow, _all_closed(flow, gated))  # what closing everything leaves
        self.forward: dict[Value, Tensor] = {}
        self.needed: dict[Value, Tensor] = {}
        self.costs: dict[Value, Tensor] = {}
        for node in flow.record.nodes:
            for value in node.outputs:
                if flow.has_channels(value):
                    site = gated.values.get(value)
                    self.forward[value] = self._gate(site[0], value) if site else self._label(node, value)
        sliceable = Sliceable(flow)
        for node in flow.record.nodes:
            kinds = {flow.kind(value) for value in node.outputs}
            operands = self.whole.intersection(flow.operands(node)).difference(gated.values)
            keeps_all = bool(kinds & {"conv", "linear"}) and not sliceable(node)
            if keeps_all or (operands and kinds <= {"elementwise", "group_norm"}):
                self.whole.update(node.outputs)
        for node in reversed(flow.record.nodes):
            self._spread_need(node)

    def _gate(self, path: str, value: Value) -> Tensor:
        labels = self.first[path] + torch.arange(self.sizes[path], device="cpu")
        return over_channels(labels, self.flow[value].size)

    def _either(self, a: Tensor, b: Tensor) -> Tensor:
        """The labels of channels that close with either of two."""
        result = torch.where(a >= 0, a, b)
        for index in ((a >= 0) & (b >= 0) & (a != b)).nonzero().flatten().tolist():
            result[index] = self._join(int(a[index]), int(b[index]))
        return result

    def _join(self, a: int, b: int) -> int:
        parts = tuple(sorted({*self.parts.get(a, (a,)), *self.parts.get(b, (b,))}))
        if len(parts) > _MOST_GATES:
            return a
        if parts not in self.joined:
            names = tuple(self.gates[part // _SHIFT][0] for part in parts)
            if names not in self.gates:
                self.gates.append(names)
                self.next.append((len(self.gates) - 1) * _SHIFT)
            number = self.gates.index(names)
            label, self.next[number] = self.next[number], self.next[number] + 1
            self.joined[parts], self.parts[label] = label, parts
        return self.joined[parts]

    def read(self, node: Node, value: Value) -> Tensor:
        """The labels of a value as one node reads it."""
        site = self.gated.inputs.get((node, value))
        label = self._gate(site[0], value) if site else self.forward[value]
        return self._zero(node, value, label) if is_padded(node) else label  # another constant changes at the border

    def _zero(self, node: Node, value: Value, label: Tensor) -> Tensor:
        """The labels of those channels that are zero once they are closed."""
        known, constant = self.closed.known_to(node, value)
        return torch.where(known & (constant == 0), label, ALWAYS)

    # -- which gate closes a channel ---------------------------------------------------------------

    def _label(self, node: Node, value: Value) -> Tensor:
        channels = self.flow[value]
        always = torch.full((channels.size,), ALWAYS, device="cpu")
        if len(self.flow.record.same_layer(node)) > 1 and channels.kind == "conv":
            return always
        if channels.kind == "move":
            assert channels.source is not None and channels.index is not None
            return self.read(node, channels.source)[channels.index]
        if channels.kind == "cat":
            return torch.cat([self.read(node, p) for p in node.args[0]])
        if channels.kind == "conv" and is_depthwise(node.module):
            source = self.read(node, node.inputs[0])
            return source.repeat_interleave(channels.size // len(source))
        if channels.kind == "group_norm":
            return self._of_groups(node, self.read(node, node.inputs[0]))
        if channels.kind != "elementwise":
            return always
        labels = {o: self.read(node, o) for o in self.flow.operands(node)}
        labels = {o: label for o, label in labels.items() if len(label) == channels.size}
        first, *others = labels.values()
        same = torch.where(torch.stack([label == first for label in (first, *others)]).all(dim=0), first, always)
        if op_name(node) != "mul":
            return same
        zeros = [self._zero(node, o, label) for o, label in labels.items()]
        return torch.where(same >= 0, same, functools.reduce(self._either, zeros, always))

    # -- which gate makes a channel useless ----------------------------------------------------------

    def _spread_need(self, node: Node) -> None:
        flow = self.flow
        for value in node.outputs:
            if flow.has_channels(value) and value not in self.needed:
                self.needed[value] = torch.full((flow[value].size,), UNUSED, device="cpu")
        first = node.outputs[0] if node.outputs else None
        kind = flow.kind(first) if first is not None else ""
        if first is None or not (kind in _PASSING or (kind == "conv" and is_depthwise(node.module))):
            for source in node.inputs:
                self._add_all(node, source)
            return
        if kind == "move":
            for out in node.outputs:
                if flow.kind(out) == "move":
                    self._add(node, flow[out].source, self.effective(out), flow[out].index)  # type: ignore[arg-type]
                else:
                    self._add_all(node, node.inputs[0])
            return
        need = self.effective(first)
        if kind == "cat":
            for part, piece in zip(node.args[0], need.split([flow[p].size for p in node.args[0]]), strict=True):
                self._add(node, part, piece)
        elif kind == "group_norm":
            self._add(node, node.inputs[0], self._of_groups(node, need))
        elif kind == "conv":
            source = node.inputs[0]
            self._add(node, source, need, torch.arange(len(need), device="cpu") // (len(need) // flow[source].size))
        else:
            for source in flow.operands(node):
                wide = flow[source].size == len(need)
                self._add(node, source, need if wide else torch.full((flow[source].size,), ALWAYS, device="cpu"))

    def _add_all(self, node: Node, source: Value) -> None:
        if self.flow.has_channels(source):
            self._add(node, source, torch.full((self.flow[source].size,), ALWAYS, device="cpu"))
        elif self.flow.kind(source) == "deferred":
            self._add_all(node, self.flow[source].source)  # type: ignore[arg-type]

    def _add(self, node: Node, source: Value, need: Tensor, index: Tensor | None = None) -> None:
        have = self.needed.get(source)
        if have is None:
            have = torch.full((self.flow[source].size,), UNUSED, device="cpu")
        if index is not None:
            used = need != UNUSED
            low, high = (
                torch.full_like(have, UNUSED).scatter_reduce(0, index[used], need[used], how, include_self=False)
                for how in ("amin", "amax")
            )
            need = torch.where(low == high, low, ALWAYS)
        if (node, source) in self.gated.inputs:
            need = torch.where(need == UNUSED, need, self.read(node, source))
        self.needed[source] = _merge(have, need)

    def effective(self, value: Value) -> Tensor:
        """The label by which a value's channels cost: its own and its readers'."""
        if value not in self.costs:  # needed only after all readers have been visited
            self.costs[value] = self._either(self.forward[value], self.needed[value])
        return self.costs[value]

    # -- terms ------------------------------------------------------------------------------------------

    def terms(self) -> dict[Node, list[MacTerm]]:
        """One term for each piece of work and pair of gates."""
        return {node: self._terms_of(node) for node in self.flow.record.nodes}

    def _terms_of(self, node: Node) -> list[MacTerm]:
        if not node.outputs or node.is_constant:
            return []
        layer = self.gated.layers.get(node, ())
        first = self.flow.record.same_layer(node)[0] is node
        params = sum(p.numel() for p in node.module.parameters()) if first and node.module is not None else 0
        value = node.outputs[0]
        kind = self.flow.kind(value)
        if kind in ("conv", "linear") and value not in self.whole:
            return self._dense(node, value, params, layer)
        if kind in ("elementwise", "group_norm"):
            operations = per_element(node)
            if not (operations or params):
                return []
            counted = self.flow.source(node).tensor if is_pool(node) else value.tensor
            if self.whole.intersection(self.flow.operands(node)):
                return [MacTerm(operations * counted.numel() / self.images, params, layer)]
            return self._by_channel(value, operations * counted.numel() / self.images, params, layer)
        macs = _other_macs(node) / self.images
        return [MacTerm(macs, params, layer)] if macs or params else []

    def _of_groups(self, node: Node, labels: Tensor) -> Tensor:
        """The labels of a group norm's channels: that of their group if all of it has the same one, else ALWAYS."""
        columns = labels.reshape(groups_of(node.module), -1).unbind(1)
        return over_channels(functools.reduce(_merge, columns), len(labels))

    def _in_all_calls(self, node: Node, labels: Callable[[Node], Tensor]) -> Tensor:
        """The labels of a layer's channels: those that are the same in all of its calls, else ALWAYS."""
        return functools.reduce(_merge, map(labels, self.flow.record.same_layer(node)))

    def _dense(self, node: Node, value: Value, params: int, layer: tuple[str, ...]) -> list[MacTerm]:
        groups = groups_of(node.module)
        total = _other_macs(node) / self.images
        if is_depthwise(node.module):
            return self._by_channel(value, total, params, layer)
        outgoing = self._in_all_calls(node, lambda call: self.effective(call.outputs[0]))
        outgoing = torch.where(outgoing == UNUSED, ALWAYS, outgoing)
        terms = []
        inputs = self._in_all_calls(node, lambda call: self.read(call, call.inputs[0])).reshape(groups, -1)
        outputs = outgoing.reshape(groups, -1)
        for gate_in in (inputs.div(_SHIFT, rounding_mode="floor")).unique().tolist():
            rows = inputs.div(_SHIFT, rounding_mode="floor") == gate_in
            for gate_out in (outputs.div(_SHIFT, rounding_mode="floor")).unique().tolist():
                columns = outputs.div(_SHIFT, rounding_mode="floor") == gate_out
                share = float((rows.sum(1) * columns.sum(1)).sum()) / (rows.shape[1] * outputs.numel())
                if share:
                    scaled = self._named(inputs[rows], gate_in) + self._named(outputs[columns], gate_out)
                    terms.append(_term(total * share, round(params * share), layer, scaled))
        return terms

    def _by_channel(self, value: Value, macs: float, params: int, layer: tuple[str, ...]) -> list[MacTerm]:
        assert value.node is not None
        labels = self.effective(value)
        if has_numbers(value.node.module, len(labels)) and self.flow.is_uniform(value.node):
            labels = self._in_all_calls(value.node, lambda call: self.effective(call.outputs[0]))
        if self.flow.kind(value) == "group_norm":
            labels = self._of_groups(value.node, labels)
        labels = torch.where(labels == UNUSED, ALWAYS, labels)
        numbers = labels.div(_SHIFT, rounding_mode="floor")
        terms = []
        for number in numbers.unique().tolist():
            share = float((numbers == number).float().mean())
            scaled = self._named(labels[numbers == number], number)
            terms.append(_term(macs * share, round(params * share), layer, scaled))
        return terms

    def _named(self, labels: Tensor, number: int) -> list[Factor]:
        """The gates of these labels, each with those of its channels that they name; None for all of them."""
        if number < 0:
            return []
        factors: list[Factor] = []
        parts = [self.parts.get(label, (label,)) for label in labels.unique().tolist()]
        for name, own in zip(self.gates[number], zip(*parts, strict=True), strict=True):
            channels = sorted({part % _SHIFT for part in own})
            factors.append((name, None if len(channels) == self.sizes[name] else tuple(channels)))
        return factors


def _term(macs: float, params: int, layer: tuple[str, ...], scaled: list[Factor]) -> MacTerm:
    gates = (*layer, *(name for name, _ in scaled))
    channels = (*[None] * len(layer), *(which for _, which in scaled))
    return MacTerm(macs, params, gates, channels if any(c is not None for c in channels) else ())


def _all_closed(flow: Flow, gated: GatePlaces) -> Masks:
    def closed(value: Value) -> Tensor:
        return torch.zeros(flow[value].size, dtype=torch.bool, device="cpu")

    return Masks({v: closed(v) for v in gated.values}, {key: closed(key[1]) for key in gated.inputs}, {})


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Needed by both: UNUSED has no effect, equal gates stay, else always."""
    always = torch.full((), ALWAYS, device="cpu")
    return torch.where(a == UNUSED, b, torch.where((b == UNUSED) | (a == b), a, always))


def per_element(node: Node) -> int:
    """Operations per element of the output, of the input in a pool, that fvcore counts for an elementwise node."""
    module, name = node.module, op_name(node)
    if isinstance(module, (*NORMS, nn.GroupNorm)):
        return norm_operations(module)
    if "batch_norm" in name:
        return 2
    mode = module.mode if isinstance(module, nn.Upsample) else name.removeprefix("upsample_").removesuffix("2d")
    return 1 if is_pool(node) else {"nearest": 1, "bilinear": 4}.get(mode, 0)


def is_pool(node: Node) -> bool:
    """Whether fvcore counts the node's input elements: a pool to a fixed size."""
    if isinstance(node.module, nn.AdaptiveAvgPool2d) or op_name(node) == "_adaptive_avg_pool2d":
        return True
    # what a pool to one pixel becomes
    return op_name(node) == "mean" and list(node.args[1:2]) == [[-1, -2]] and list(node.args[2:3]) == [True]


def _images_of(flow: Flow) -> int:
    """The batch that was recorded; views may have folded it into other dimensions, or others into it."""
    given = [value.tensor for value in flow.record.inputs]
    batches = [len(t) for t in given if t.dim() in (4, 5)] or [len(t) for t in given if t.dim() == 2]
    return max(1, batches[0] if batches else sum(t.dim() == 3 for t in given))  # detectors take a list of images


def _other_macs(node: Node) -> float:
    """MACs of a node whose work is a matrix product or a norm's over channels; 0 for others."""
    module, out = node.module, node.outputs[0].tensor
    sources = [v.tensor for v in node.inputs]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return float(dense_macs(sources[0].shape, module.weight.shape))
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return float(dense_macs(out.shape, module.weight.shape))
    if isinstance(module, MIXING_NORMS):
        return float(norm_operations(module) * out.numel())
    if node.op == CALL:
        return 0.0
    if op_name(node) == "convolution" and not node.args[6]:
        return float(dense_macs(out.shape, sources[1].shape))
    if op_name(node) in ("addmm", "mm", "bmm", "baddbmm"):
        return float(out.numel() * sources[-2].shape[-1])
    return 0.0
