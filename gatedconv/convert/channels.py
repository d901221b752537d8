"""Which channels of a frozen model are needed, and which its tensors hold once it is compact.

Three passes over a recorded run: forward for the constants that closed gates leave (`constants`), backward for what
outputs need, and a fixed point for what is present in each tensor, since the model's own code adds, multiplies and
concatenates tensors whose channels have to match.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gatedconv.convert.constants import MOST_CAUTION, Constants, is_padded
from gatedconv.convert.flow import MOVING, PASSING, Flow, op_name
from gatedconv.convert.install import over_channels
from gatedconv.convert.module_kinds import CONVS, groups_of, has_numbers, is_computed, is_depthwise, is_exact
from gatedconv.convert.record import CALL, ModuleCall, Node, Value
from gatedconv.convert.verify import is_same

_SAFE_MOVES = frozenset("permute transpose t squeeze unsqueeze alias detach same clone flip roll slice".split())
_VIEWS = ("view", "_unsafe_view", "reshape")


class Sliceable:
    """Decides from weights and forward code alone which layers of a recorded model may lose channels."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.record = flow, flow.record
        modules = self.record.model.modules()
        self.owners = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
        self.read_by_code = self.record.read_by_code

    def shares(self, module: nn.Module) -> bool:
        """Whether another module has weights of this one, too."""
        return any(self.owners[id(p)] > 1 for p in module.parameters())

    def is_own(self, node: Node) -> bool:
        """Whether a layer shares nothing, is the only reader of its weights, and has the same channels in all calls."""
        assert node.module is not None
        return node.scope not in self.read_by_code and not self.shares(node.module) and self.flow.is_uniform(node)

    def __call__(self, node: Node) -> bool:
        """Whether a convolution or linear layer may lose channels: its own, and its weights no other code's."""
        module = node.module
        assert module is not None
        if is_computed(module) or not self.is_own(node):
            return False
        if is_exact(module, *CONVS, nn.Linear) or is_depthwise(module):
            return True
        return groups_of(module) == 1 and self._reads_by_channel(node)

    def _reads_by_channel(self, node: Node) -> bool:
        """Whether the weights of a channel do nothing where it is zero; standardized weights depend on each other.

        A layer with code of its own is tried out, once.
        """
        if node.scope not in self.record.reads_by_channel:
            self.record.reads_by_channel[node.scope] = _ignores_zeros(node)
        return self.record.reads_by_channel[node.scope]


@torch.no_grad()
def _ignores_zeros(node: Node) -> bool:
    layer, x = copy.deepcopy(node.module).eval(), node.inputs[0].tensor[:1].detach().clone()  # type: ignore[union-attr]
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    half = layer.weight.shape[1] // 2
    x.narrow(1 if isinstance(layer, nn.Conv2d) else -1, 0, half).zero_()
    try:
        before = layer(x)
        layer.weight[:, :half] += layer.weight.abs().amax() + 1
        return is_same(layer(x), before)
    except Exception:  # whatever foreign code raises for other weights
        return False


@dataclass
class Removal(Constants):
    """The channels that each tensor of a frozen model keeps, by the three passes of the module's docstring.

    Attributes:
        caution: 0: any tensor may shrink; 1: reshaped tensors shrink only behind ``nn.Flatten`` and its like; 2: no
            tensor visible to user code shrinks, and a dense layer keeps all that it reads of a flattened map.
        unsliceable: paths of modules that have to stay as they are.
    """

    unsliceable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        late = [node for node in self.record.nodes if self.record.is_late(node)]
        reads = any(bool(self.known[v].any()) for node in late for v in node.inputs if v in self.known)
        if reads or self.record.may_skip_layers:
            self.caution = MOST_CAUTION  # code that did not run now may read them as well
        self.need: dict[Value, Tensor] = {}
        self.present: dict[Value, Tensor] = {}
        self.sliced: dict[str, ModuleCall] = {}  # modules of foreign code whose numbers per channel are sliced
        self.sliceable = Sliceable(self.flow)
        self.alive: set[Value] = set()  # what code that is left computes with, be it a constant
        self.alike = [v for v in self._alike() if len(v) > 1 and all(map(self.flow.has_channels, v))]
        grew = True
        while grew:  # a layer computes for all of its calls what one of them needs
            for node in reversed(self.record.nodes):
                self._spread_need(node)
            grown = [_unite(self.need, values) for values in self.alike]
            grew = any(grown)
        self._find_present()

    def _alike(self) -> Iterator[list[Value]]:
        """Values that keep the same channels: what a module with several calls reads in each, or what it returns.

        It becomes smaller, or is framed by gathers and scatters, once for all of them.
        """
        for calls in self.record.layers.values():
            again = len(calls) > 1 and calls[0].inputs and calls[0].outputs and self.flow.is_uniform(calls[0])
            if again and has_numbers(calls[0].module, self.flow[calls[0].outputs[0]].size):
                yield [call.inputs[0] for call in calls]
                yield [call.outputs[0] for call in calls]
        masked = defaultdict[str, list[Value]](list)
        for value, path in self.masks.paths.items():
            masked[path].append(value)
        yield from masked.values()

    # -- demand ----------------------------------------------------------------------------------------

    def wanted(self, value: Value) -> Tensor:
        """Bool (C,): the channels of a value that have to be computed."""
        return self.need[value] & ~self.known[value]

    def _spread_need(self, node: Node) -> None:
        flow = self.flow
        for value in node.outputs:
            if flow.has_channels(value):
                self.need.setdefault(value, self.zeros(value))
        if node.op == "output":
            self._need_all(node)
            self.alive.update(node.inputs)
            return
        for value in node.outputs:
            kind = flow.kind(value)
            layer = kind in ("conv", "linear") and (self.is_sliceable(node) or self.is_dead(node))
            replaced = layer or value in self.masks.values  # by constants where they are known
            if bool(self.wanted(value).any()) if replaced else value in self.alive:
                self.alive.update(node.inputs)
            if not flow.has_channels(value):
                if value in self.alive:
                    self._need_all(node)
                continue
            wanted = self.wanted(value)
            if not bool(wanted.any()):
                continue
            if kind == "move":
                source, index = flow[value].source, flow[value].index
                assert source is not None and index is not None
                self._add(
                    source,
                    torch.zeros(flow[source].size, dtype=torch.bool, device="cpu").index_fill(0, index[wanted], True),
                )
            elif kind == "elementwise":
                for operand in flow.operands(node):
                    self._add(operand, wanted if flow[operand].size == len(wanted) else wanted.any().reshape(1))
            elif kind == "cat":
                for part, piece in zip(node.args[0], wanted.split([flow[p].size for p in node.args[0]]), strict=True):
                    self._add(part, piece)
            elif kind in ("conv", "group_norm"):
                source = node.inputs[0]
                live = _live_groups(node, wanted, flow[source].size)
                self._add(source, live & self.read_channels(node) if kind == "conv" else live)
            elif kind == "linear":
                self._add(node.inputs[0], self.read_channels(node))
            else:
                self._need_all(node)

    def _add(self, value: Value, need: Tensor) -> None:
        self.need[value] = self.need.get(value, self.zeros(value)) | need

    def _need_all(self, node: Node) -> None:
        for value in node.inputs:
            source = self.flow[value].source if self.flow.kind(value) == "deferred" else value
            if self.flow.has_channels(source):
                assert source is not None
                self._add(source, ~self.zeros(source))

    def read_channels(self, node: Node) -> Tensor:
        """Bool (C_in,): the inputs of a layer that its bias cannot replace."""
        known, constant = self.known_to_layer(node)
        if self.caution == MOST_CAUTION and any(self._is_flattened(n.inputs[0]) for n in self.record.same_layer(node)):
            return torch.ones_like(known)  # code may flatten larger maps, too, to rows of this size
        return ~known | (constant != 0) if is_padded(node) else ~known

    def _is_flattened(self, value: Value) -> bool:
        """Whether a value (N, K) may be a flattened map, or what dropout or an activation makes of one."""
        while self.flow.kind(value) == "elementwise" and (source := self.flow[value].source) is not None:
            value = source
        return self.flow.kind(value) == "move" and value.tensor.dim() == 2

    # -- what tensors hold -----------------------------------------------------------------------------

    def _find_present(self) -> None:
        self.present = {value: self.wanted(value).clone() for value in self.known}
        for held in self.present.values():
            if self.caution == MOST_CAUTION:
                held[:] = True
        changed = True
        while changed:
            before = sum(int(held.sum()) for held in self.present.values())
            for node in (*self.record.nodes, *reversed(self.record.nodes)):
                self._constrain(node)
            for values in self.alike:
                _unite(self.present, values)
            for held in self.present.values():
                if not bool(held.any()) and len(held):
                    held[0] = True  # layers refuse tensors without channels
            changed = sum(int(held.sum()) for held in self.present.values()) != before

    def _all(self, *values: Value | None) -> None:
        for value in values:
            if value is not None and self.flow.kind(value) == "deferred":
                value = self.flow[value].source
            if value in self.present:
                self.present[value][:] = True

    def _constrain(self, node: Node) -> None:
        flow = self.flow
        if node.op == "output":
            self._all(*node.inputs)
        for value in node.outputs:
            kind = flow.kind(value)
            if kind == "conv" or kind == "linear":
                self._constrain_layer(node, value)
            elif kind == "elementwise":
                self._constrain_elementwise(node, value)
            elif kind == "group_norm" and self.can_slice_numbers(node, value):
                source = node.inputs[0]
                held = _live_groups(node, self.present[source] | self.raw(value), flow[source].size)
                self.present[source] |= held
                if value not in self.masks.values:
                    self.present[value] |= held
            elif kind == "move":
                self._constrain_move(node, value)
            elif kind == "cat":
                held = self.present[value]
                for part, piece in zip(node.args[0], held.split([flow[p].size for p in node.args[0]]), strict=True):
                    piece |= self.present[part]
                    self.present[part] |= piece
            elif value.users or value is node.outputs[0]:  # statistics that a norm also returns, which are not read
                self._all(*node.inputs)
                if value not in self.masks.values:  # behind a gate the closed channels can be dropped
                    self._all(value)

    def _constrain_layer(self, node: Node, value: Value) -> None:
        source, module = node.inputs[0], node.module
        assert module is not None
        if not self.is_sliceable(node):
            if self.is_dead(node):
                return
            self._all(source)
            if value not in self.masks.values:
                self._all(value)
            return
        read, write = self.layer_channels(node, value)
        self.present[source] |= read
        if groups_of(module) > 1 and value not in self.masks.values:
            self.present[value] |= write

    def raw(self, value: Value) -> Tensor:
        """Bool (C,): the channels that a value's own node computes: those present, less the closed of its gate."""
        return self.present[value] & ~self.known[value] if value in self.masks.values else self.present[value]

    def layer_channels(self, node: Node, value: Value) -> tuple[Tensor, Tensor]:
        """Bool (C_in,) and (C_out,): what a convolution or linear layer reads and what it computes.

        Groups that are used have as many inputs and outputs as the fullest of them. torch.nn's Conv2d and Linear can be
        replaced where nothing is needed; other layers keep one channel, since only they know the size of their output.
        """
        groups, module = groups_of(node.module), node.module
        assert module is not None
        plain = is_exact(module, nn.Conv2d, nn.Linear)
        write = self.wanted(value).reshape(groups, -1)
        keeps_one = not plain and not bool(write.any())
        write[0, 0] |= keeps_one
        read = self.read_channels(node).reshape(groups, -1)
        live = write.any(dim=1)
        read = torch.zeros_like(read) if keeps_one else read & live[:, None]
        if groups > 1:
            return _filled(read, live).flatten(), _filled(write, live).flatten()
        read[0, 0] |= not bool(read.any()) and (not plain or bool(write.any()))
        return read.flatten(), write.flatten()

    def _constrain_elementwise(self, node: Node, value: Value) -> None:
        operands = self.flow.operands(node)
        size = self.flow[value].size
        if any(self.flow[o].size != size for o in operands):
            self._all(*(o for o in operands if self.flow[o].size != size))
        if not self.can_slice_numbers(node, value):
            self._all(*operands)
            if value not in self.masks.values:
                self._all(value)
            return
        wide = [o for o in operands if self.flow[o].size == size]
        held = self.raw(value)
        for operand in wide:
            held = held | self.present[operand]
        for operand in wide:
            if (node, operand) in self.masks.inputs:
                self._all(operand, value)
            self.present[operand] |= held
        if value not in self.masks.values:
            self.present[value] |= held

    def can_slice_numbers(self, node: Node, value: Value) -> bool:
        """Whether what a node holds for each channel, if anything, can be made smaller."""
        module, size = node.module, self.flow[value].size
        if module is not None:
            if not has_numbers(module, size):
                return True
            mine = not self.sliceable.shares(module) and self.flow.is_uniform(node)
            return node.scope not in self.unsliceable and mine
        axis, dims = self.flow[value].axis, value.tensor.dim()
        constants = [v.tensor for v in node.inputs if v.is_constant]
        sized = "batch_norm" in op_name(node) or any(
            axis - (dims - t.dim()) >= 0 and t.shape[axis - (dims - t.dim())] not in (1,) for t in constants
        )
        return not sized or self._enclosing(node) is not None

    def _enclosing(self, node: Node) -> ModuleCall | None:
        """The call of the smallest module around a node, if its numbers per channel can be sliced."""
        for call in sorted(self.record.calls_of(node.scope), key=lambda c: c.last - c.first):
            if not call.first <= node.order < call.last:
                continue
            fits = len(call.inputs) == 1 and len(call.outputs) == 1 and call.path
            if fits and self.flow.has_channels(call.inputs[0]) and self._can_slice(call):
                size = self.flow[call.inputs[0]].size
                if self.flow[call.outputs[0]].size == size and not isinstance(call.module, nn.Sequential):
                    self.sliced[call.path] = call
                    return call
        return None

    def _can_slice(self, call: ModuleCall) -> bool:
        alone = len(self.record.calls_of(call.path)) == 1 and not self.sliceable.shares(call.module)
        return call.path not in self.unsliceable and alone

    def _constrain_move(self, node: Node, value: Value) -> None:
        channels = self.flow[value]
        source, index = channels.source, channels.index
        assert source is not None and index is not None
        size = self.flow[source].size
        whole = len(index) == size and torch.equal(index, torch.arange(size, device="cpu"))
        flat = (
            value.tensor.dim() == 2
            and len(index) % size == 0
            and torch.equal(index, torch.arange(size, device="cpu").repeat_interleave(len(index) // size))
        )
        name, direct = op_name(node), node.inputs[0] is source
        safe = whole and (name in _SAFE_MOVES or isinstance(node.module, PASSING))
        safe = safe or ((whole or flat) and isinstance(node.module, MOVING))
        safe = safe or (self.caution == 0 and (whole or flat) and (name in _VIEWS or direct))
        if not safe or (not direct and self.caution):
            self._all(source, value)
            return
        if value in self.masks.values:
            self._all(source)
            return
        held = torch.zeros(size, dtype=torch.bool, device="cpu").index_fill(0, index[self.present[value]], True)
        self.present[source] |= held
        self.present[value] |= self.present[source][index]

    def computed(self, node: Node, value: Value) -> Tensor:
        """Bool (C,): the channels that come out of the node itself, before gates and what is put around it."""
        flow, kind = self.flow, self.flow.kind(value)
        if kind in ("conv", "linear"):
            if not self.is_sliceable(node):
                return self.zeros(value) if self.is_dead(node) else ~self.zeros(value)
            return self.layer_channels(node, value)[1]
        if value not in self.masks.values:
            return self.present[value]
        if kind in ("elementwise", "group_norm") and self.can_slice_numbers(node, value):
            return next(self.present[o] for o in flow.operands(node) if flow[o].size == flow[value].size)
        if kind == "cat":
            return torch.cat([self.present[p] for p in node.args[0]])
        return ~self.zeros(value)

    def is_idle(self, node: Node) -> bool:
        """Whether a module of one input and size has an output that is not read, or that a gate makes constant."""
        return node.op == CALL and all(map(self._is_idle, self.record.same_layer(node)))

    def _is_idle(self, node: Node) -> bool:
        if not node.outputs or not self.flow.has_channels(node.outputs[0]):
            return False
        value = node.outputs[0]
        kind, source = self.flow.kind(value), node.inputs[0]
        if kind not in ("elementwise", "group_norm", "mix") or value.tensor.shape != source.tensor.shape:
            return False
        return not bool(self.wanted(value).any()) if value in self.masks.values else value not in self.alive

    def is_sliceable(self, node: Node) -> bool:
        """Whether a convolution or linear layer may lose channels."""
        return node.scope not in self.unsliceable and self.sliceable(node)

    def is_dead(self, node: Node) -> bool:
        """Whether nothing reads a layer's output or weights, and the output has the size that torch.nn's would have.

        Of layers with code of their own the size may be another for other images: those are left to run with caution.
        """
        own = getattr(type(node.module), "forward", None) not in (nn.Conv2d.forward, nn.Linear.forward)
        if own and (self.caution or not _has_usual_size(node)):
            return False
        return not bool(self.wanted(node.outputs[0]).any()) and self.sliceable.is_own(node)


def _has_usual_size(node: Node) -> bool:
    layer, source, out = node.module, node.inputs[0].tensor, node.outputs[0].tensor
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
        return False
    numbers = zip(source.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    return list(out.shape[2:]) == [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in numbers]


def _live_groups(node: Node, wanted: Tensor, channels: int) -> Tensor:
    """Bool (channels,): of the node's input, the groups of whose outputs bool (C,) any is wanted."""
    return over_channels(wanted.reshape(groups_of(node.module), -1).any(dim=1), channels)


def _unite(held: dict[Value, Tensor], values: list[Value]) -> bool:
    """Let each value hold what one of them holds, bool (C,); returns whether one has grown."""
    union = torch.stack([held[value] for value in values]).any(dim=0)
    grew = any(not torch.equal(held[value], union) for value in values)
    held.update((value, union.clone()) for value in values)
    return grew


def _filled(marked: Tensor, live: Tensor) -> Tensor:
    """(groups, size): what is marked, and in each live group as many more as the fullest of them has."""
    counts = marked.sum(dim=1)
    most = max(1, int(counts[live].max())) if bool(live.any()) else 0
    result = marked.clone()
    for group in live.nonzero().flatten().tolist():
        lacking = (~marked[group]).nonzero().flatten()[: most - int(counts[group])]
        result[group, lacking] = True
    return result
