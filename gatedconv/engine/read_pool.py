"""Reads pooling layers, and means over the pixels, off the nodes of a traced graph."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from gatedconv.engine.layers import Layer, is_map
from gatedconv.engine.read_arithmetic import Call, make_layer, pair

_WINDOW = ((1, "kernel_size", None), (2, "stride", None), (3, "padding", 0))  # arguments of a call


def read_window(kind: str, node: fx.Node, kernel: Any, stride: Any, padding: Any, option: int = 0) -> Layer | None:
    """A layer of a kind whose outputs each read a window of a map; None where the input is no map."""
    if not is_map(node.args[0]):
        return None
    top, left = pair(padding)
    stride = kernel if stride is None or stride == () or stride == [] else stride
    return make_layer(
        kind, node, kernel=pair(kernel), stride=pair(stride), padding=(top, left, top, left), option=option
    )


def read_max_pool(node: fx.Node, pool: nn.MaxPool2d) -> Layer | None:
    """Read `nn.MaxPool2d`."""
    if pool.return_indices or pair(pool.dilation) != (1, 1):
        return None
    return read_window("max_pool", node, pool.kernel_size, pool.stride, pool.padding, 2 * bool(pool.ceil_mode))


def read_call_max_pool(call: Call) -> Layer | None:
    """Read `F.max_pool2d`."""
    if pair(call.get(4, "dilation", 1)) != (1, 1) or call.get(6, "return_indices", False):
        return None
    kernel, stride, padding = (call.get(i, n, d) for i, n, d in _WINDOW)
    return read_window("max_pool", call.node, kernel, stride, padding, 2 * bool(call.get(5, "ceil_mode", False)))


def read_avg_pool(node: fx.Node, pool: nn.AvgPool2d) -> Layer | None:
    """Read `nn.AvgPool2d`."""
    if pool.divisor_override is not None:
        return None
    option = bool(pool.count_include_pad) + 2 * bool(pool.ceil_mode)
    return read_window("avg_pool", node, pool.kernel_size, pool.stride, pool.padding, option)


def read_call_avg_pool(call: Call) -> Layer | None:
    """Read `F.avg_pool2d`."""
    if call.get(6, "divisor_override") is not None:
        return None
    values = kernel, stride, padding = [call.get(i, n, d) for i, n, d in _WINDOW]
    if any(
        isinstance(v, fx.Node) for value in values for v in (value if isinstance(value, (tuple, list)) else [value])
    ):
        return None
    option = bool(call.get(5, "count_include_pad", True)) + 2 * bool(call.get(4, "ceil_mode", False))
    return read_window("avg_pool", call.node, kernel, stride, padding, option)


def read_adaptive_pool(kind: str, node: fx.Node, size: Any) -> Layer | None:
    """Read an adaptive pool of a kind, "avg" or "max", to a size."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if not is_map(node.args[0]) or len(sides) != 2 or not all(isinstance(s, int) for s in sides):
        return None
    if kind == "avg" and sides == (1, 1):
        return make_layer("mean_pool", node)
    return make_layer(f"adaptive_{kind}_pool", node, kernel=sides)


def read_adaptive_max_pool(node: fx.Node, pool: nn.AdaptiveMaxPool2d) -> Layer | None:
    """Read `nn.AdaptiveMaxPool2d`."""
    return None if pool.return_indices else read_adaptive_pool("max", node, pool.output_size)


def read_mean(call: Call) -> Layer | None:
    """Read a mean over height and width."""
    dims: Any = call.get(1, "dim")
    if not isinstance(dims, (tuple, list)) or not is_map(call.node.args[0]):
        return None
    if sorted(int(d) % 4 for d in dims) != [2, 3] or call.node.kwargs.get("dtype") is not None:
        return None
    return make_layer("mean_pool", call.node)
