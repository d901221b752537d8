"""Residual branches: found from the additions of a graph, not from the names of its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import op_name, scope_of, submodule
from gatedconv.convert.flow import Flow


@dataclass(eq=False)
class Branch:
    """One side of an addition that can be left out: addition = shortcut + branch(entry).

    Attributes:
        addition: the node that adds.
        part: the branch's last node.
        entry: the one node outside that the branch reads.
        nodes: the branch's nodes; nothing outside reads any of them but ``part``.
        shortcut_nodes: what the shortcut computes from the same entry, if it is no identity.
    """

    addition: fx.Node
    part: fx.Node
    entry: fx.Node
    nodes: set[fx.Node]
    shortcut_nodes: set[fx.Node]

    @property
    def name(self) -> str:
        """Path of the module whose forward adds."""
        return scope_of(self.addition)


def find_branches(flow: Flow) -> tuple[list[Branch], dict[str, str]]:
    """All residual branches, outer ones before those inside them, and additions that hold none: name -> reason."""
    order = {node: index for index, node in enumerate(flow.graph_module.graph.nodes)}
    found: list[Branch] = []
    rejected: dict[str, str] = {}
    for node in flow.graph_module.graph.nodes:
        if node.op in ("call_function", "call_method") and op_name(node) == "add" and flow.kind(node) == "binary":
            branch, reason = _branch_of(node, flow, order)
            if branch is not None:
                found.append(branch)
            elif reason:
                rejected[f"{scope_of(node)}:{node.name}".lstrip(":")] = reason
    return sorted(found, key=lambda b: (-len(b.nodes), order[b.addition])), rejected


def is_weighted(node: fx.Node, flow: Flow) -> bool:
    """Whether the node multiplies by a matrix of weights."""
    module = submodule(node)
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return flow.kind(node) in ("conv", "linear") or isinstance(module, layers)


@torch.no_grad()
def runs_empty(branch: Branch, graph_module: fx.GraphModule) -> bool:
    """Whether the branch computes something for a batch without samples: ``view(n, -1)`` does not, for one."""
    entry = branch.entry.meta["val"]
    values: dict[fx.Node, Any] = {branch.entry: torch.empty((0, *entry.shape[1:]), dtype=entry.dtype)}
    run = fx.Interpreter(graph_module)
    run.env = values
    modules = {str(n.target): graph_module.get_submodule(str(n.target)) for n in branch.nodes if n.op == "call_module"}
    if any(p.device.type != "cpu" for module in modules.values() for p in module.parameters()):
        return False
    try:
        for node in graph_module.graph.nodes:
            constant = node.op == "get_attr"
            if constant or node in branch.nodes:
                values[node] = run.run_node(node)
    except Exception:  # whatever a layer says of an empty batch
        return False
    return True


def _branch_of(addition: fx.Node, flow: Flow, order: dict[fx.Node, int]) -> tuple[Branch | None, str]:
    sides = [a for a in addition.args[:2] if flow.has_channels(a)]
    if len(sides) != 2 or sides[0] is sides[1]:
        return None, ""
    if len({tuple(side.meta["val"].shape) for side in sides}) > 1:  # type: ignore[union-attr]
        return None, "the operands of the addition differ in shape"
    if addition.kwargs.get("alpha", 1) != 1:
        return None, "the addition scales its operand"
    candidates, reasons = [], []
    regions = [_private(side, addition) for side in sides]  # type: ignore[arg-type]
    for side, region, other, others in zip(sides, regions, reversed(sides), reversed(regions), strict=True):
        work = sum(_weights(node, flow) for node in region)
        if not work:
            continue
        outside = {n for node in region for n in node.all_input_nodes} - region
        tensors = [n for n in outside if isinstance(n.meta.get("val"), Tensor) and flow.kind(n) != "constant"]
        if len(tensors) != 1 or any(flow.kind(n) in ("size", "deferred") for n in outside):
            reasons.append(
                f"the branch reads {len(outside)} tensors" if len(tensors) != 1 else "it needs sizes from outside"
            )
            continue
        entry = tensors[0]
        if entry is not other and entry not in _ancestors(other, order[entry], order):  # type: ignore[arg-type]
            reasons.append("the other side of the addition does not come from the branch's input")
        elif entry.meta["val"].dim() != 4 or not flow.has_channels(entry):
            reasons.append("the branch's input is no image")
        else:
            outside = others if other is not entry else set()
            candidates.append((work, Branch(addition, side, entry, region, outside)))  # type: ignore[arg-type]
    if not candidates:
        return None, "; ".join(sorted(set(reasons)))
    return max(candidates, key=lambda c: c[0])[1], ""


def _private(last: fx.Node, reader: fx.Node) -> set[fx.Node]:
    """Nodes that only ``reader`` profits from, by way of ``last``."""
    if set(last.users) != {reader}:
        return set()
    region, queue = {last}, [last]
    while queue:
        # Every node that joins brings its inputs up again, so one with several readers joins with the last.
        for source in queue.pop().all_input_nodes:
            if source not in region and source.op != "placeholder" and set(source.users) <= region:
                region.add(source)
                queue.append(source)
    return region


def _ancestors(node: fx.Node, oldest: int, order: dict[fx.Node, int]) -> set[fx.Node]:
    seen, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen and order[source] >= oldest:
                seen.add(source)
                queue.append(source)
    return seen


def _weights(node: fx.Node, flow: Flow) -> int:
    if not is_weighted(node, flow):
        return 0
    module = submodule(node)
    if module is not None:
        return sum(p.numel() for p in module.parameters())
    return sum(n.meta["val"].numel() for n in node.all_input_nodes if flow.kind(n) == "constant")
