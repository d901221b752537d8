"""Writes to a view of a tensor, in a graph where nothing is changed in place: what the tensor becomes, as a new one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


class ViewWriter:
    """Writes to views, in one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.written: dict[tuple[fx.Node, fx.Node], fx.Node | None] = {}  # (view, what it became) -> its source then

    def write(self, before: fx.Node, other: fx.Node, result: fx.Node) -> fx.Node | None:
        """The new ``other`` where ``before``, which shares its memory, becomes ``result``; None if it has no form.

        The result is put back into what ``before`` is a view of, up to the tensor that both are views of; of that,
        ``other`` is viewed anew.
        """
        up, down = _views(before), _views(other)
        shared = next((node for node in up if node in down), None)
        if shared is None:
            return None
        value: fx.Node | None = result
        for view in up[: up.index(shared)]:
            if value is not None and (view, value) not in self.written:
                self.written[view, value] = _put_back(self.graph, view, value)
            value = value and self.written[view, value]
        for view in reversed(down[: down.index(shared)]):
            value = value and _view_again(self.graph, view, value)
        return value


def _views(node: fx.Node) -> list[fx.Node]:
    """A node, what it is a view of, and so on."""
    found = [node]
    while (source := _source(found[-1])) is not None:
        found.append(source)
    return found


def _source(node: fx.Node) -> fx.Node | None:
    """The tensor that a node is a view of; None where it has memory of its own."""
    call: Any = node.args[0] if node.target is operator.getitem else node  # a part of a split
    schema = getattr(call.target, "_schema", None)
    if schema is None or schema.is_mutable or not schema.arguments or schema.arguments[0].alias_info is None:
        return None
    source = call.args[0]
    return source if isinstance(source, fx.Node) else None


def _section(view: fx.Node) -> tuple[Any, ...] | None:
    """Dimension, first, last and step of a slice or of a part of a split, as far as they are given."""
    if view.target is aten.slice.Tensor:
        return view.args[1:]
    if view.target is not operator.getitem:
        return None
    call, index = view.args
    assert isinstance(call, fx.Node) and isinstance(index, int)
    if call.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return None
    given: Any = call.args[1]
    widths = [given] * (index + 1) if isinstance(given, int) else list(given)
    if not all(isinstance(width, int) for width in widths):
        return None
    start = sum(widths[:index])
    return (call.args[2] if len(call.args) > 2 else 0), start, start + widths[index]


def _put_back(graph: fx.Graph, view: fx.Node, value: fx.Node) -> fx.Node | None:
    """The source of ``view``, with the viewed part replaced by ``value``; None where that cannot be written."""
    source, section = _source(view), _section(view)
    assert source is not None
    if section is not None:
        return graph.call_function(aten.slice_scatter.default, (source, value, *section))
    if view.target is aten.select.int:
        return graph.call_function(aten.select_scatter.default, (source, value, *view.args[1:]))
    if view.target is aten.view.default and "tensor_meta" in source.meta:
        dims = source.meta["tensor_meta"].dim()
        size = [graph.call_method("size", (source, dim)) for dim in range(dims)]
        return graph.call_function(aten.reshape.default, (value, size))
    return value if view.target in (aten.detach.default, aten.alias.default) else None


def _view_again(graph: fx.Graph, view: fx.Node, value: fx.Node) -> fx.Node | None:
    """The same view, taken of ``value``."""
    if view.target is operator.getitem:
        section = _section(view)
        return None if section is None else graph.call_function(aten.slice.Tensor, (value, *section))
    return graph.create_node("call_function", view.target, (value, *view.args[1:]), dict(view.kwargs))
