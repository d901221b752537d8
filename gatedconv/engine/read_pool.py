"""Reads pooling layers, and means over the pixels, off the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from gatedconv.engine.layers import Layer, is_map
from gatedconv.engine.read_arithmetic import Call, make_layer, pair


def read_window(kind: str, node: fx.Node, kernel: Any, stride: Any, padding: Any, **fields: bool) -> Layer | None:
    """A layer of a kind whose outputs each read a window of a map; None where the input is no map.

    More fields of `Layer` are taken as they are.
    """
    if not is_map(node.args[0]):
        return None
    top, left = pair(padding)
    sides = (top, left, top, left)
    return make_layer(kind, node, kernel=pair(kernel), stride=pair(stride or kernel), padding=sides, **fields)


def read_max_pool(call: Call) -> Layer | None:
    """Read a max pool."""
    if pair(call.get(4, "dilation", 1)) != (1, 1):
        return None
    kernel, stride, padding, up = call.get(1), call.get(2), call.get(3, default=0), call.get(5, default=False)
    return read_window("max_pool", call.node, kernel, stride, padding, rounds_up=bool(up))


def read_avg_pool(call: Call) -> Layer | None:
    """Read an average pool."""
    if call.get(6, "divisor_override") is not None:
        return None
    kernel, stride, padding, up = call.get(1), call.get(2), call.get(3, default=0), call.get(4, default=False)
    counts = bool(call.get(5, "count_include_pad", True))
    return read_window("avg_pool", call.node, kernel, stride, padding, rounds_up=bool(up), counts_padding=counts)


def read_adaptive_pool(kind: str) -> Callable[[Call], Layer | None]:
    """Reader of an adaptive pool of a kind, "avg" or "max"."""

    def read(call: Call) -> Layer | None:
        return make_layer(f"adaptive_{kind}_pool", call.node, kernel=pair(call.get(1))) if is_map(call.source) else None

    return read


def read_mean(call: Call) -> Layer | None:
    """Read a mean over height and width."""
    dims = call.get(1, "dim")
    if not isinstance(dims, (tuple, list)) or not is_map(call.source) or call.node.kwargs:
        return None
    return make_layer("mean_pool", call.node) if sorted(int(d) % 4 for d in dims) == [2, 3] else None
