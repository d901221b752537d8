"""Residual branches: found from the additions of a recorded run, not from the names of its modules."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from gatedconv.convert.flow import Flow, op_name
from gatedconv.convert.record import CALL, ModuleCall, Node, Record, Value

_SCALING = ("mul", "div", "clone", "_to_copy")
_WALKS = {"children", "named_children", "modules", "named_modules", "_modules"}


@dataclass(eq=False)
class Branch:
    """One side of an addition that can be left out: addition = shortcut + branch(entry).

    Attributes:
        addition: the node that adds.
        part: the branch's last value.
        entry: the one value outside that the branch reads.
        nodes: the branch's nodes; nothing outside reads any of them but the addition.
        shortcut_nodes: what the shortcut computes from the same entry, if it is no identity.
    """

    addition: Node
    part: Value
    entry: Value
    nodes: set[Node]
    shortcut_nodes: set[Node]

    @property
    def name(self) -> str:
        """Path of the module whose forward adds."""
        return self.addition.scope

    def end(self, record: Record) -> ModuleCall | None:
        """The module call that ends the branch, apart from scaling by parameters; None if there is none."""
        value = self.part
        while True:
            for call in record.producers(value):
                own = record.nodes_of(call)
                once = self._runs_once(call, record) and len(call.outputs) == 1
                if once and call.path and all(n in self.nodes or n.is_constant for n in own):
                    return call
            node = value.node
            sources = [v for v in node.inputs if not v.is_constant] if node is not None else []
            if node is None or op_name(node) not in _SCALING or len(sources) != 1 or node not in self.nodes:
                return None
            value = sources[0]

    def start(self, record: Record) -> ModuleCall | None:
        """The call that the branch's input is given to first; None where that is no module of its own."""
        calls = [c for c in record.readers(self.entry) if c.inputs[0] is self.entry and c.path]
        once = [c for c in calls if self._runs_once(c, record)]
        block = [c for c in once if c.path == self.name and not _walks_over_children(c.module)]
        inside = [c for c in once if any(n in self.nodes for n in record.nodes_of(c)[:1])]
        first = min((c.first for c in inside), default=0)
        found = block or [c for c in inside if c.first == first and not _walks_over_children(c.module)]
        return found[0] if found else None

    def _runs_once(self, call: ModuleCall, record: Record) -> bool:
        """Whether a module runs once whenever the one around the branch does."""
        return len(record.calls_of(call.path)) == len(record.calls_of(self.name))


def _walks_over_children(module: nn.Module) -> bool:
    """Whether the forward of a module, or a method that it calls, iterates over its children: a gate would be one."""
    kind, names, waiting = type(module), set[str](), ["forward"]
    while waiting:
        new = _names_in(kind, waiting.pop()) - names
        names |= new
        waiting += [name for name in new if inspect.isfunction(getattr(kind, name, None))]
    return isinstance(module, nn.Sequential) or bool(names & _WALKS)


def _names_in(kind: type, method: str) -> set[str]:
    """The names in the code of a method and, where it calls super(), in that of the methods that it overrides."""
    names: set[str] = set()
    for base in kind.__mro__:
        code = getattr(inspect.unwrap(vars(base).get(method) or len), "__code__", None)
        names |= set(code.co_names) if code is not None else set()
        if method in vars(base) and (code is None or "super" not in code.co_names):
            break
    return names


def find_branches(flow: Flow) -> tuple[list[Branch], dict[str, str]]:
    """All residual branches, outer ones before those inside them, and additions that hold none: name -> reason."""
    found: list[Branch] = []
    rejected: dict[str, str] = {}
    for node in flow.record.nodes:
        if op_name(node) == "add" and len(flow.operands(node)) == 2 and node.outputs:
            branch, reason = _branch_of(node, flow)
            if branch is not None:
                found.append(branch)
            elif reason:
                rejected[f"{node.scope}:add_{node.order}".lstrip(":")] = reason
    return sorted(found, key=lambda b: (-len(b.nodes), b.addition.order)), rejected


def _branch_of(addition: Node, flow: Flow) -> tuple[Branch | None, str]:
    sides = flow.operands(addition)
    if sides[0] is sides[1] or addition.kwargs.get("alpha", 1) != 1:
        return None, ""
    if sides[0].tensor.shape != sides[1].tensor.shape:
        return None, "the operands of the addition differ in shape"
    candidates, reasons, wider = [], [], list[tuple[int, set[Value]]]()
    regions = [_private(side, addition) for side in sides]
    for side, region, other, others in zip(sides, regions, reversed(sides), reversed(regions), strict=True):
        work = sum(weights_of(node) for node in region)
        if not work:
            continue
        outside = {v for node in region for v in node.inputs if v.node not in region and not v.is_constant}
        if len(outside) != 1:
            reasons.append(f"the branch reads {len(outside)} tensors")
            wider.append((work, outside))
            continue
        (entry,) = outside
        if entry is not other and entry not in _ancestors(other, entry):
            reasons.append("the other side of the addition does not come from the branch's input")
        elif entry.tensor.dim() != 4 or not flow.has_channels(entry):
            reasons.append("the branch's input is no image")
        else:
            shortcut = others if other is not entry else set()
            candidates.append((work, Branch(addition, side, entry, region, shortcut)))
    # The projection of a block whose branch reads an embedding, too, is its shortcut.
    candidates = [(work, b) for work, b in candidates if not any(w > work and b.entry in read for w, read in wider)]
    if not candidates:
        return None, "; ".join(sorted(set(reasons)))
    return max(candidates, key=lambda c: c[0])[1], ""


def _private(last: Value, reader: Node) -> set[Node]:
    """Nodes whose results only ``reader`` uses, through ``last``."""
    if last.node is None or last.node.op == "input" or set(last.users) != {reader}:
        return set()
    region, queue = {last.node}, [last.node]
    while queue:
        # The inputs of a node that joins are tried again, so a node with several readers joins with the last of them.
        for value in queue.pop().inputs:
            source = value.node
            if source is None or source in region or source.op == "input":
                continue
            if all(user in region for out in source.outputs for user in out.users):
                region.add(source)
                queue.append(source)
    return region


def _ancestors(value: Value, oldest: Value) -> set[Value]:
    limit = oldest.node.order if oldest.node is not None else -1
    seen, queue = {value}, [value]
    while queue:
        node = queue.pop().node
        for source in node.inputs if node is not None else ():
            if source not in seen and source.node is not None and source.node.order >= limit:
                seen.add(source)
                queue.append(source)
    return seen


def weights_of(node: Node) -> int:
    """Numbers in the matrix that a node multiplies by; 0 for others."""
    if node.op == CALL and isinstance(node.module, (nn.modules.conv._ConvNd, nn.Linear)):
        return sum(p.numel() for p in node.module.parameters())
    if op_name(node) in ("convolution", "addmm", "mm"):
        return sum(v.tensor.numel() for v in node.inputs if v.is_constant)
    return 0
