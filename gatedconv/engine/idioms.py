"""Idioms of a graph, written as one call each: parts of channels, channel shuffles, resizing, flattening, products."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatedconv.engine.layers import size_of

aten = torch.ops.aten
_RESHAPES = (aten.view, aten._unsafe_view)


def slice_channels(x: Tensor, start: int, stop: int) -> Tensor:
    """(N, C, H, W) -> (N, stop - start, H, W): one part of a chunk, a split or a slice."""
    return x[:, start:stop]


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) -> the same, channel g * (C / groups) + i moved to i * groups + g."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def resize_like(x: Tensor, reference: Tensor, mode: str, align_corners: bool | None) -> Tensor:
    """(N, C, H, W), (N, K, H', W') -> (N, C, H', W')."""
    return F.interpolate(x, size=reference.shape[2:], mode=mode, align_corners=align_corners)


def multiply_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., C), (C, K), (K,) -> (..., K)."""
    return F.linear(x, weight.t(), bias)


def as_pixels(x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1)."""
    return x[:, :, None, None]


def adaptive_maximum(x: Tensor, size: list[int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size)."""
    return F.adaptive_max_pool2d(x, size)


def join_idioms(traced: fx.GraphModule) -> None:
    """Write what takes several nodes, or a node with several results, as one call each."""
    for node in list(traced.graph.nodes):
        call = next((found for read in _IDIOMS if node.op == "call_function" and (found := read(node))), None)
        if call is None:
            continue
        function, args = call
        name = node.meta.get("path") or getattr(function, "overloadpacket", function).__name__
        with traced.graph.inserting_before(node):
            joined = traced.graph.create_node("call_function", function, args, name=name)
        joined.meta.update(node.meta)
        node.replace_all_uses_with(joined)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def operation_of(node: Any) -> Any:
    """The function that a node calls, of whatever overload; None where it calls none."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    return getattr(node.target, "overloadpacket", node.target)


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return str(getattr(getattr(node.target, "overloadpacket", node.target), "__name__", node.target))


def argument_of(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    """An argument that a call gives by position or by name."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


Joined = tuple[Callable[..., Tensor], tuple[Any, ...]] | None
"""A function and its arguments, where a node is an idiom."""


def _first(node: fx.Node) -> Joined:
    """The result of a norm or a pooling that returns more than that."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return None
    call: Any = node.args[0]
    kind, args = operation_of(call), call.args
    if kind is aten.native_batch_norm:
        return aten.batch_norm.default, (*args, False)
    if kind is aten.native_layer_norm:
        return aten.layer_norm.default, args
    if kind is aten.native_group_norm:
        x, weight, bias, _, _, _, groups, epsilon = args
        return aten.group_norm.default, (x, groups, weight, bias, epsilon)
    if kind is aten.adaptive_max_pool2d:
        return adaptive_maximum, args
    return (aten.max_pool2d.default, args) if kind is aten.max_pool2d_with_indices else None


def _slice(node: fx.Node) -> Joined:
    """A part of a split over the channels, or a slice of channels."""
    shape, start = size_of(node), 0
    source: Any = node.args[0] if node.args else None
    if operation_of(node) is aten.slice:
        dim, first = argument_of(node, 1, "dim", 0), argument_of(node, 2, "start")
        if argument_of(node, 4, "step", 1) != 1 or not (first is None or isinstance(first, int)):
            return None
    elif node.target is operator.getitem and operation_of(source) in (aten.split, aten.split_with_sizes):
        index: Any = node.args[1]
        widths, dim, first = source.args[1], argument_of(source, 2, "dim", 0), 0
        widths, source = [widths] * index if isinstance(widths, int) else widths[:index], source.args[0]
        if not all(isinstance(width, int) for width in widths):
            return None
        start = sum(widths)
    else:
        return None
    size = size_of(source)
    if size is None or shape is None or len(size) != 4 or dim not in (1, -3):
        return None
    larger = size_of(node, True)
    if larger is not None and larger[1] != shape[1]:
        return None  # as many channels as the image has pixels
    start = start or slice(first, None).indices(size[1])[0]
    return slice_channels, (source, start, start + shape[1])


def _sizes(*nodes: Any) -> Iterator[tuple[tuple[int, ...] | None, ...]]:
    """The shapes of nodes' values for the example's size, then for a larger one if the first node has any."""
    for larger in (False, True):
        sizes = tuple(size_of(node, larger) for node in nodes)
        if larger and sizes[0] is None:
            return  # the model takes no other size
        yield sizes


def _shuffle(node: fx.Node) -> Joined:
    """View as groups, transpose, view back."""
    swap: Any = node.args[0] if node.args else None
    if operation_of(swap) is aten.clone:
        swap = swap.args[0]
    turned = operation_of(swap) is aten.transpose and sorted(swap.args[1:]) == [1, 2]
    turned = turned or (operation_of(swap) is aten.permute and swap.args[1] == [0, 2, 1, 3, 4])
    split: Any = swap.args[0] if turned else None
    if operation_of(node) not in _RESHAPES or operation_of(split) not in _RESHAPES:
        return None
    source = split.args[0]
    groups = []
    for size, parts, result in _sizes(source, split, node):
        if size is None or parts is None or result != size or len(size) != 4 or len(parts) != 5:
            return None
        if parts[0] != size[0] or parts[3:] != size[2:] or parts[1] * parts[2] != size[1]:
            return None
        groups.append(parts[1])
    return (shuffle_channels, (source, groups[0])) if len(set(groups)) == 1 else None


def _flatten(node: fx.Node) -> Joined:
    """View as vectors."""
    if operation_of(node) not in _RESHAPES and node.target is not aten.squeeze.dims:
        return None
    for before, after in _sizes(node.args[0], node):
        if before is None or after is None or len(before) != 4 or after != (before[0], math.prod(before[1:])):
            return None
    return aten.flatten.using_ints, (node.args[0], 1)


def _pixels(node: fx.Node) -> Joined:
    """View vectors as maps of one pixel."""
    source: Any = node.args[0] if node.args else None
    if operation_of(node) is aten.unsqueeze and operation_of(source) is aten.unsqueeze:
        source = source.args[0]
    elif operation_of(node) not in _RESHAPES:
        return None
    for size, after in _sizes(source, node):
        if size is None or len(size) != 2 or after != (*size, 1, 1):
            return None
    return as_pixels, (source,)


def _strides(node: fx.Node) -> Joined:
    """Another order of channels and pixels in memory, where there is one pixel."""
    size, source = size_of(node), node.args[0] if node.args else None
    if node.target is not aten.as_strided.default or len(node.args) != 3 or size is None or size != size_of(source):
        return None
    if size_of(node, True) != size_of(source, True):
        return None
    channels_follow = node.args[2][:2] == [size[1], 1]  # type: ignore[index]
    return (aten.alias.default, (source,)) if len(size) == 4 and size[2:] == (1, 1) and channels_follow else None


def _resize(node: fx.Node) -> Joined:
    """Interpolation to the size of another map."""
    if node.target is aten.upsample_nearest2d.default:
        mode, corners, scales = "nearest", None, node.args[2:]
    elif node.target is aten.upsample_bilinear2d.default:
        mode, corners, scales = "bilinear", node.args[2], node.args[3:]
    else:
        return None
    reference = _map_of(node.args[1])
    if any(scale is not None for scale in scales) or len(size_of(reference) or ()) != 4:
        return None
    return resize_like, (node.args[0], reference, mode, corners)


def _map_of(size: Any) -> fx.Node | None:
    """The map whose height and width these are."""
    sizes: list[Any] = [one.args for one in size if isinstance(one, fx.Node) and one.target == "size"]
    if [dim for _, dim in sizes] != [2, 3] or sizes[0][0] is not sizes[1][0]:
        return None
    found: fx.Node = sizes[0][0]
    return found


def _pool(node: fx.Node) -> Joined:
    """An average over a window of the map's size."""
    if node.target is not aten.avg_pool2d.default or _map_of(node.args[1]) is not node.args[0]:
        return None
    return (aten.mean.dim, (node.args[0], [2, 3], True)) if len(node.args) == 2 else None


def _multiply(node: fx.Node) -> Joined:
    """A product with a constant matrix, of vectors or of what is viewed as vectors for the time of the product."""
    product: Any = node.args[0] if operation_of(node) in _RESHAPES else node
    kind, bias = operation_of(product), None
    if kind is aten.addmm and not product.kwargs:
        bias, x, weight = product.args
    elif kind is aten.mm:
        x, weight = product.args
    else:
        return None
    folded = operation_of(x) in _RESHAPES
    if weight.op != "get_attr" or folded == (product is node):
        return None
    source = x.args[0] if folded else x
    for before, after, vectors in _sizes(source, node, x):
        if before is None or after is None or before[:-1] != after[:-1] or before[-1:] != (vectors or ())[-1:]:
            return None
    return multiply_channels, (source, weight, bias)


_IDIOMS = (_first, _slice, _shuffle, _flatten, _pixels, _strides, _resize, _pool, _multiply)
