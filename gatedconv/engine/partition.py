"""Splits a model's graph into segments that a plan runs and the rest, which stays in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from gatedconv.engine.layers import Layer, is_map, is_nhwc
from gatedconv.engine.read_layer import read_layer


@dataclass
class Segment:
    """Consecutive nodes that a plan computes from one map.

    Attributes:
        nodes: In graph order.
        layers: What they compute, one layer each.
        source: The only value that they read from outside.
        result: The only one of them that is read outside.
    """

    nodes: list[fx.Node]
    layers: list[Layer]
    source: fx.Node
    result: fx.Node


def find_segments(traced: fx.GraphModule, supports: Callable[[Layer], bool] = lambda layer: True) -> list[Segment]:
    """Return the longest segments of layers that `supports` takes, in order; each holds at least one convolution."""
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    layers = [layer if layer and supports(layer) else None for layer in (read_layer(n, traced) for n in nodes)]
    segments = []
    start = 0
    while start < len(nodes):
        segment = _longest_from(nodes, layers, start)
        if segment is not None:
            segments.append(segment)
        start += len(segment.nodes) if segment is not None else 1
    return segments


def _longest_from(nodes: list[fx.Node], layers: list[Layer | None], start: int) -> Segment | None:
    best = None
    inside: list[fx.Node] = []
    run: list[Layer] = []
    sources: set[fx.Node] = set()
    open_uses: dict[fx.Node, int] = {}  # nodes of the segment with readers outside of it, so far
    for node, layer in zip(nodes[start:], layers[start:], strict=True):
        if layer is None:
            break
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                continue  # a constant
            if read in open_uses:
                open_uses[read] -= 1
                if open_uses[read] == 0:
                    del open_uses[read]
            else:
                sources.add(read)
        if len(sources) > 1:
            break
        inside.append(node)
        run.append(layer)
        if node.users:
            open_uses[node] = len(node.users)
        # One value leaves, and it is not one that the last fusion would have to compute twice.
        if len(open_uses) == 1 and any(layer.kind == "conv" for layer in run):
            result = next(iter(open_uses))
            source = next(iter(sources))
            if is_map(source) and not is_nhwc(result) and "flattened" not in result.meta:
                best = Segment(list(inside), list(run), source, result)
    return best
