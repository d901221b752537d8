"""Idioms of a traced graph, written as one call each: chunks, splits, channel shuffles, resizing, flattening."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_IN_PLACE_FUNCTIONS = {operator.iadd, operator.imul, operator.isub, operator.itruediv, torch.relu_}


def slice_channels(x: Tensor, start: int, stop: int) -> Tensor:
    """(N, C, H, W) -> (N, stop - start, H, W): one part of a chunk, a split or a slice."""
    return x[:, start:stop]


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) -> the same, channel g * (C / groups) + i moved to i * groups + g."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def resize_like(x: Tensor, reference: Tensor, mode: str, align_corners: bool | None) -> Tensor:
    """(N, C, H, W), (N, K, H', W') -> (N, C, H', W')."""
    return F.interpolate(x, size=reference.shape[2:], mode=mode, align_corners=align_corners)


def join_idioms(traced: fx.GraphModule) -> None:
    """Write chunks, splits, channel shuffles and resizing to another map's size as one call each."""
    for node in list(traced.graph.nodes):
        call = _slice(node, traced) or _shuffle(node) or _resize(node) or _flatten(node)
        if call is None:
            continue
        function, args = call
        with traced.graph.inserting_before(node):
            joined = traced.graph.call_function(function, args)
        joined.meta.update({key: node.meta[key] for key in ("tensor_meta", "larger_shape") if key in node.meta})
        node.replace_all_uses_with(joined)
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and not is_in_place(node, traced):
            traced.graph.erase_node(node)
    traced.recompile()


def is_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a node writes to its first argument."""
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_function":
        return node.target in _IN_PLACE_FUNCTIONS or bool(node.kwargs.get("inplace", False))
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")


def size_of(node: Any, larger: bool = False) -> tuple[int, ...] | None:
    """The shape of a node's value for the example, or for the larger image; None where it is unknown."""
    if not isinstance(node, fx.Node):
        return None
    meta = node.meta.get("larger_shape") if larger else getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if meta is None else tuple(meta)


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def argument_of(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    """An argument that a call gives by position or by name."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def _slice(node: fx.Node, traced: fx.GraphModule) -> tuple[Any, tuple[Any, ...]] | None:
    """An element of a chunk or split over the channels, or a slice of channels."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    parts, index = node.args[0], node.args[1]
    shape = size_of(node)
    if isinstance(index, tuple):
        source, start = parts, None
        full = slice(None, None, None)
        if len(index) < 2 or index[0] != full or any(i != full for i in index[2:]) or not isinstance(index[1], slice):
            return None
        size = size_of(source)
        if size is None or not all(v is None or isinstance(v, int) for v in (index[1].start, index[1].stop)):
            return None
        start, _, step = index[1].indices(size[1])
        if step != 1:
            return None
    elif isinstance(index, int) and name_of(parts) in ("chunk", "split"):
        source = parts.args[0] if parts.args else None  # type: ignore[assignment]
        given = parts.args[1] if len(parts.args) > 1 else None
        size = size_of(source)
        if argument_of(parts, 2, "dim", 0) not in (1, -3) or size is None:
            return None
        if name_of(parts) == "split" and isinstance(given, (list, tuple)):
            if not all(isinstance(width, int) for width in given):
                return None
            widths = list(given)
        elif isinstance(given, int):
            chunk = name_of(parts) == "chunk"
            width = -(-size[1] // given) if chunk else given
            widths = [min(width, size[1] - at) for at in range(0, size[1], width)]
        else:
            return None
        start = sum(widths[: index % len(widths)])
    else:
        return None
    assert isinstance(source, fx.Node)
    if shape is None or size is None or len(size) != 4 or shape != (size[0], shape[1], *size[2:]):
        return None
    # A slice is a view: what is written to it, or to what it views, in place, would be seen in the other.
    if any(is_in_place(user, traced) for viewed in (source, node, *parts.users) for user in viewed.users):
        return None
    return slice_channels, (source, start, start + shape[1])


_RESHAPES = ("view", "reshape")


def _shuffle(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """View as groups, transpose, view back."""
    chain = [node]
    while len(chain) < 5 and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    names = [str(getattr(one.target, "__name__", one.target)) for one in chain]
    if len(names) > 2 and names[1] == "contiguous":
        del chain[1], names[1]
    if len(chain) < 4 or names[0] not in _RESHAPES or names[1] != "transpose" or names[2] not in _RESHAPES:
        return None
    back, swap, split, source = chain[:4]
    if sorted((argument_of(swap, 1, "dim0"), argument_of(swap, 2, "dim1"))) != [1, 2]:
        return None
    groups = []
    for larger in (False, True):
        size, parts, result = (size_of(one, larger) for one in (source, split, back))
        if larger and size is None:
            break  # the model takes no other size
        if size is None or parts is None or result != size or len(size) != 4 or len(parts) != 5:
            return None
        if parts[0] != size[0] or parts[3:] != size[2:] or parts[1] * parts[2] != size[1]:
            return None
        groups.append(parts[1])
    return (shuffle_channels, (source, groups[0])) if len(set(groups)) == 1 else None


def _flatten(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """View as vectors."""
    if node.op != "call_method" or node.target not in _RESHAPES:
        return None
    for larger in (False, True):
        before, after = size_of(node.args[0], larger), size_of(node, larger)
        if larger and before is None:
            break  # the model takes no other size
        if before is None or after is None or len(before) != 4 or after != (before[0], math.prod(before[1:])):
            return None
    return torch.flatten, (node.args[0], 1)


def _resize(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Interpolation to the size of another map, worked out from its shape."""
    if node.target is not F.interpolate:
        return None
    if argument_of(node, 2, "scale_factor") is not None:
        return None
    if node.kwargs.get("antialias") or node.kwargs.get("recompute_scale_factor"):
        return None
    reference = _sized_like(argument_of(node, 1, "size"))
    shape, wanted = size_of(node), size_of(reference)
    if shape is None or wanted is None or len(wanted) != 4 or shape[2:] != wanted[2:]:
        return None
    larger = (size_of(node, True), size_of(reference, True))
    if larger[0] is None or larger[1] is None or larger[0][2:] != larger[1][2:]:
        return None
    mode, corners = argument_of(node, 3, "mode", "nearest"), argument_of(node, 4, "align_corners")
    return resize_like, (node.args[0], reference, mode, corners)


def _sized_like(size: Any) -> fx.Node | None:
    """The map whose height and width these are: x.shape[2:], (x.shape[2], x.shape[3]) or (x.size(2), x.size(3))."""
    if isinstance(size, fx.Node):
        whole = size.target is operator.getitem and size.args[1] in (slice(2, None, None), slice(-2, None, None))
        return _shape_of_what(size.args[0]) if whole else None
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    found: list[Any] = []
    for axis, one in enumerate(size, start=2):
        if not isinstance(one, fx.Node) or len(one.args) != 2 or one.args[1] not in (axis, axis - 4):
            return None
        if one.target is operator.getitem:
            found.append(_shape_of_what(one.args[0]))
        elif one.op == "call_method" and one.target == "size":
            found.append(one.args[0])
    return found[0] if len(found) == 2 and found[0] is found[1] and isinstance(found[0], fx.Node) else None


def _shape_of_what(shape: Any) -> fx.Node | None:
    """The tensor of `x.shape` or `x.size()`."""
    if not isinstance(shape, fx.Node) or not shape.args or not isinstance(shape.args[0], fx.Node):
        return None
    is_shape = shape.target is getattr and shape.args[1] == "shape"
    is_size = shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1
    return shape.args[0] if is_shape or is_size else None
