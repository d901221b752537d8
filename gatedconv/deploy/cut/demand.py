"""What is needed: for each node, the channels that some reader cannot do without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gatedconv.convert.flow import Flow
from gatedconv.deploy.cut.facts import Facts


class Demand:
    """Backward pass: ``wanted(node)`` are the channels to compute, needed and not constant."""

    def __init__(self, flow: Flow, facts: Facts) -> None:
        self.flow = flow
        self.facts = facts
        self.need = {
            node: torch.zeros(flow[node].size, dtype=torch.bool) for node in facts.facts if flow.has_channels(node)
        }
        self.live: set[fx.Node] = set()  # nodes without channels that are read
        for node in reversed(list(flow.graph_module.graph.nodes)):
            self._spread(node)

    def wanted(self, node: fx.Node) -> Tensor:
        """Int64, ascending: the channels of a node that have to be computed."""
        return (self.need[node] & ~self.facts.known(node)).nonzero().flatten()

    def is_sized(self) -> bool:
        """Whether a constant is needed that holds for the example's height and width alone."""
        return any(bool((need & self.facts[n].known & self.facts[n].sized).any()) for n, need in self.need.items())

    def _spread(self, node: fx.Node) -> None:
        flow, kind = self.flow, self.flow.kind(node)
        if kind == "output":
            for source in node.all_input_nodes:
                self._all(source)
            return
        if not flow.has_channels(node):
            if node in self.live and kind != "size":
                for source in node.all_input_nodes:
                    self._all(source)
            return
        wanted = self.wanted(node)
        if wanted.numel() == 0:
            return
        need = torch.zeros(flow[node].size, dtype=torch.bool)
        need[wanted] = True
        if kind == "move":
            self.need[flow[node].source] |= _any_at(flow[flow[node].source].size, flow[node].index[need])  # type: ignore
        elif kind == "channelwise":
            self.need[self.facts.source(node)] |= need
        elif kind == "binary":
            for operand in node.args[:2]:
                if flow.has_channels(operand):
                    self.need[operand] |= need if flow[operand].size == len(need) else True  # type: ignore
        elif kind == "cat":
            parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
            for part, piece in zip(parts, need.split([flow[p].size for p in parts]), strict=True):
                self.need[part] |= piece
        elif kind in ("conv", "regroup"):
            source = self.facts.source(node)
            groups = flow[source].size // self.facts.weight(node).shape[1] if kind == "conv" else flow[node].size
            self.need[source] |= need.reshape(groups, -1).any(dim=1).repeat_interleave(flow[source].size // groups)
        else:
            for source in node.all_input_nodes:
                self._all(source)

    def _all(self, source: fx.Node) -> None:
        if self.flow.has_channels(source):
            self.need[source][:] = True
        else:
            self.live.add(source)


def _any_at(size: int, index: Tensor) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[index] = True
    return mask
