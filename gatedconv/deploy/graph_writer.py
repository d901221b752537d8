"""Merges records of a model at several input sizes into one graph; what differs must follow from tensors' sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import combinations, count
from typing import Any

import torch
from torch import fx, nn

from gatedconv.convert.record import CALL, Node, Record, Value
from gatedconv.deploy.graph_format import set_module
from gatedconv.deploy.graph_views import ViewWriter
from gatedconv.nn import GraphNet

_RESHAPES = ("view", "_unsafe_view")
_COMPARISONS = frozenset("gt_ ge_ lt_ le_ eq_ ne_ logical_and_ logical_or_ logical_xor_ logical_not_".split())


class NoGraph(ValueError):
    """The model's forward cannot be written as a graph."""


class GraphWriter:
    """Writes the graph that several records of a model agree on; ``larger``: the record of larger images."""

    def __init__(self, model: nn.Module, runs: list[Record], larger: int | None) -> None:
        self.model, self.runs, self.larger = model, runs, larger
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: dict[Value, fx.Node] = {}
        self.views = ViewWriter(self.graph)
        self.shapes: dict[fx.Node, list[torch.Size]] = {}  # in every run, of what was written, in order
        self.state = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        self.names = (name for number in count() if (name := f"constant_{number}") not in self.state)

    def write(self) -> GraphNet:
        """The graph; NoGraph where the records do not agree."""
        self.needed = self._needed()
        for nodes in zip(*(run.nodes for run in self.runs), strict=True):
            self._emit(nodes)
        self.graph.lint()
        result = GraphNet(self.root, self.graph, type(self.model).__name__)
        vars(result)["returned"] = self.runs[0].returned
        for module in result.modules():
            if getattr(module, "inplace", False) is True:  # another node may read what it would overwrite
                module.inplace = False  # type: ignore[assignment]
        return result.eval()

    def _needed(self) -> set[Node]:
        needed: set[Node] = set()
        for node in reversed(self.runs[0].nodes):
            if node.op in ("output", "input") or any(user in needed for v in node.outputs for user in v.users):
                needed.add(node)
        return needed

    def _emit(self, nodes: tuple[Node, ...]) -> None:
        node = nodes[0]
        if node not in self.needed:
            return
        if node.op == "input":
            for index in range(len(node.outputs)):
                self._know(nodes, index, self.graph.placeholder("input" if index == 0 else f"input_{index}"))
        elif node.op == "output":
            structures = [run.structure for run in self.runs]
            self.graph.output(self._argument(structures, nodes))
        elif node.op == "same":
            self.nodes[node.outputs[0]] = self._argument([n.inputs[0] for n in nodes], nodes)
        elif node.op == "overwritten":
            self._know(nodes, 0, self._overwritten(nodes))
        else:
            self._call(nodes)

    def _know(self, nodes: tuple[Node, ...], index: int, new: fx.Node) -> None:
        """Take a node of the graph for one of the results of a recorded node."""
        value, shapes = nodes[0].outputs[index], [node.outputs[index].tensor.shape for node in nodes]
        self.nodes[value] = new
        if index == 0:
            self.shapes[new] = shapes
        new.meta["tensor_meta"] = value.tensor
        if self.larger is not None:
            new.meta["larger_shape"] = tuple(shapes[self.larger])
        if path := self._path(nodes[0]):
            new.meta["path"] = path

    def _path(self, node: Node) -> str:
        """The module in whose forward a node ran, if that has no other modules; else ''."""
        has_children = any(True for _ in self.model.get_submodule(node.scope).children())
        return "" if has_children else node.scope

    def _call(self, nodes: tuple[Node, ...]) -> None:
        node = nodes[0]
        if node.op == CALL:
            args, kwargs = self._arguments(nodes)
            if node.scope not in dict(self.root.named_modules()):
                set_module(self.root, node.scope, self.model.get_submodule(node.scope))
            new = self.graph.call_module(node.scope, args, kwargs)
        else:
            func = _functional(node)
            if "upsample" in node.op and "2d" in node.op and all(isinstance(a, float) for a in node.args[-2:]):
                # By factors, from which the size follows.
                func, source = getattr(torch.ops.aten, node.op).vec, self._argument([n.args[0] for n in nodes], nodes)
                *more, height, width = self._argument([n.args[2:] for n in nodes], nodes)
                args, kwargs = (source, None, *more, [height, width]), {}
            else:
                args, kwargs = self._arguments(nodes)
            name = self._path(node) or func._schema.name.split("::")[1]
            new = self.graph.create_node("call_function", func, args, kwargs, name)
        for index, place in enumerate(node.places):
            result = new
            for key in place:
                result = self.graph.call_function(operator.getitem, (result, key))
            self._know(nodes, index, result)

    def _overwritten(self, nodes: tuple[Node, ...]) -> fx.Node:
        """A tensor after another view of its memory was written."""
        for values in zip(*(node.args for node in nodes), strict=True):
            _require_one_source(values)
        other, result, before = nodes[0].args
        views = None if before is None else (self.nodes[before], self._read(other, nodes, 0))
        written = None if views is None else self.views.write(*views, self.nodes[result])
        if written is None:
            raise NoGraph("it changes a view of a tensor in place")
        return written

    # -- arguments -------------------------------------------------------------------------------------

    def _arguments(self, nodes: tuple[Node, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        node = nodes[0]
        if node.op in _RESHAPES and isinstance(node.args[1], (list, tuple)):
            source = self._argument([n.args[0] for n in nodes], nodes)
            return (source, self._sizes([n.args[1] for n in nodes], nodes)), {}
        args = self._argument([n.args for n in nodes], nodes)
        return args, {key: self._argument([n.kwargs[key] for n in nodes], nodes) for key in node.kwargs}

    def _sizes(self, of_runs: list[list[int]], nodes: tuple[Node, ...]) -> list[Any]:
        """The sizes that a tensor is reshaped to; one of them follows from the others and may be any number."""
        if len({len(one) for one in of_runs}) > 1:
            raise NoGraph("its arguments depend on the image's size")
        sizes: list[Any] = []
        for each in zip(*of_runs, strict=True):
            try:
                sizes.append(self._argument(list(each), nodes))
            except NoGraph:
                sizes.append(-1)
        if sizes.count(-1) > 1:
            raise NoGraph("it computes with the image's size")
        return sizes

    def _argument(self, of_runs: list[Any], nodes: tuple[Node, ...]) -> Any:
        """One argument, given as each run has it."""
        first = of_runs[0]
        if isinstance(first, Value):
            _require_one_source(of_runs)
            index = nodes[0].inputs.index(first)
            return self._read(first, nodes, index)
        if isinstance(first, (list, tuple)):
            if len({len(one) for one in of_runs}) > 1:
                raise NoGraph("its arguments depend on the image's size")
            parts = [self._argument(list(part), nodes) for part in zip(*of_runs, strict=True)]
            return parts if isinstance(first, list) else tuple(parts)
        if isinstance(first, dict):
            return {key: self._argument([one[key] for one in of_runs], nodes) for key in first}
        if all(type(one) is type(first) and one == first for one in of_runs):
            return first
        if isinstance(first, int) and not isinstance(first, bool):
            return self._size(of_runs, nodes)
        raise NoGraph(f"its arguments depend on the image's size: {first!r}")

    def _size(self, numbers: list[int], nodes: tuple[Node, ...]) -> fx.Node:
        """A number that is a dimension of a tensor, or a multiple or fraction of one, or a product of two."""
        read = nodes[0].inputs
        shapes = [[n.inputs[i].tensor.shape for n in nodes] for i in range(len(read))]
        inputs = [(self.nodes[v], shape) for v, shape in zip(read, shapes, strict=True) if v in self.nodes]
        written = list(self.shapes.items())
        for node, dim, sizes in _dimensions([*inputs, *reversed(written)]):
            if sizes == numbers:
                return self.graph.call_method("size", (node, dim))
        for node, dim, sizes in _dimensions([*inputs, *written[: len(self.runs[0].inputs)]]):
            part = _fraction(numbers, sizes)
            if part is not None:
                result = self.graph.call_method("size", (node, dim))
                if part.numerator != 1:
                    result = self.graph.call_function(operator.mul, (result, part.numerator))
                if part.denominator != 1:
                    result = self.graph.call_function(operator.floordiv, (result, part.denominator))
                return result
        for one, other in combinations(_dimensions(inputs), 2):
            if [a * b for a, b in zip(one[2], other[2], strict=True)] == numbers:
                factors = tuple(self.graph.call_method("size", (node, dim)) for node, dim, _ in (one, other))
                return self.graph.call_function(operator.mul, factors)
        raise NoGraph("it computes with the image's size")

    def _read(self, value: Value, nodes: tuple[Node, ...], index: int) -> fx.Node:
        if value in self.nodes and value.numbers is None:
            return self.nodes[value]
        if not value.is_constant or value.node is not None:
            raise NoGraph("it uses a tensor that no recorded operation made")
        if value.numbers is not None:
            others = [node.inputs[index].numbers for node in nodes[1:]]
            if any(t is None or t.shape != value.numbers.shape or not torch.equal(t, value.numbers) for t in others):
                raise NoGraph("a constant of its code depends on the image's size")
        if value in self.nodes:
            return self.nodes[value]
        self.nodes[value] = self._constant(value)
        self.nodes[value].meta["tensor_meta"] = torch.empty_like(value.tensor, device="meta")
        return self.nodes[value]

    def _constant(self, value: Value) -> fx.Node:
        name = value.name or next(self.names)
        tensor: Any = self.state[name] if value.name else value.numbers
        owner, _, attribute = name.rpartition(".")
        if owner and owner not in dict(self.root.named_modules()):
            set_module(self.root, owner, nn.Module())
        holder = self.root.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(attribute, tensor)
        elif attribute not in holder._buffers:
            holder.register_buffer(attribute, tensor.detach().clone())
        first = next(iter(self.graph.nodes), None)
        if first is None:
            return self.graph.get_attr(name)
        with self.graph.inserting_before(first):
            return self.graph.get_attr(name)


def _require_one_source(values: Iterable[Any]) -> None:
    """NoGraph unless every run reads the same value; `_read` compares the numbers of constants without a name."""

    def source(value: Any) -> Any:
        if not isinstance(value, Value):
            return None
        return -1 if value.node is None else value.node.order, value.index, value.name

    if len({source(value) for value in values}) > 1:
        raise NoGraph("which tensors it computes with depends on the image's size")


def _dimensions(shapes: Iterable[tuple[fx.Node, list[torch.Size]]]) -> Iterator[tuple[fx.Node, int, list[int]]]:
    """Every dimension of some tensors, with its size in every run."""
    for node, of_runs in shapes:
        for dim, sizes in enumerate(zip(*of_runs, strict=False)):
            yield node, dim, list(sizes)


def _fraction(numbers: list[int], sizes: list[int]) -> Fraction | None:
    """The factor f with number = floor(f * size) in every run; None where there is none."""
    if numbers[0] and sizes[0] and all(n * sizes[0] == s * numbers[0] for n, s in zip(numbers, sizes, strict=True)):
        return Fraction(numbers[0], sizes[0])
    if not all(numbers) or len(set(numbers)) < 3:  # such as a padding, which may be right for the wrong reason
        return None
    parts = round(max(sizes) / max(numbers))
    fits = parts > 1 and all(n == s // parts for n, s in zip(numbers, sizes, strict=True))
    return Fraction(1, parts) if fits else None


def _functional(node: Node) -> Any:
    """The operation itself, or the one that writes its result into a new tensor."""
    func = node.func
    if func.namespace != "aten":
        return func
    name = func._schema.name.split("::")[1]
    if not func._schema.is_mutable:
        return func
    if node.inputs[0].name:
        raise NoGraph(f"it changes its own {node.inputs[0].name}")
    if name in _COMPARISONS:
        raise NoGraph(f"it works in place, by {name}, whose functional form has another dtype")
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    types = [argument.type for argument in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        same = [argument.type for argument in found._schema.arguments] == types
        if same and not found._schema.is_mutable:
            return found
    raise NoGraph(f"it works in place, by {name}")
