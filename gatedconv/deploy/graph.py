"""A model's forward as a graph of torch.nn modules and ATen functions, from runs of its code at several sizes."""

from __future__ import annotations

import copy
import operator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.install import computing_all_samples, hooks_of
from gatedconv.convert.record import CALL, Node, Record, Value, has_own_hooks, is_computed, record
from gatedconv.convert.verify import as_inputs, distance, run_seeded
from gatedconv.deploy.graph_format import is_describable, set_module
from gatedconv.nn import GraphNet

# Pixels more in height and width. A padding may depend on whether a map's size is even; 2**n more pixels change that
# behind n layers of stride 2, and not before. Here n is 1 to 4 in one direction or the other, 1 and 2 in both.
_PARITIES = ((2, 16), (4, 2), (8, 4))


class NoGraph(ValueError):
    """The model's forward cannot be written as a graph."""


@torch.no_grad()
def write_graph(model: nn.Module, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> GraphNet:
    """The eval-mode graph of a model of one input, for any batch and, where its code allows it, any size.

    Args:
        model: it is copied.
        size: of images (N, C, H, W), vectors (N, K) or clips (N, T, C, H, W) that it takes; of another batch where
            its code needs a multiple of N.
        dtype: of its input.

    Raises:
        NoGraph: what it computes depends on the batch size, changes views in place, or cannot be run.
    """
    model = copy.deepcopy(model).cpu()
    model.eval()
    with computing_all_samples():
        try:
            return _graph_of(model, size, dtype, 2, 3)
        except NoGraph:
            if size[0] < 2:
                raise
        return _graph_of(model, size, dtype, size[0], 2 * size[0])


def _graph_of(model: nn.Module, size: tuple[int, ...], dtype: torch.dtype, few: int, many: int) -> GraphNet:
    generator = torch.Generator().manual_seed(0)

    def images(count: int, *more: int) -> Tensor:
        kept = len(size) - 1 - len(more)
        shape = (*size[1 : 1 + kept], *(n + m for n, m in zip(size[1 + kept :], more, strict=True)))
        return torch.rand(count, *shape, generator=generator).to(dtype)

    inputs = [images(few), images(many)]
    try:
        runs = [record(model, (x,), known=_is_leaf) for x in inputs]
    except Exception as error:  # whatever the model's code raises
        raise NoGraph(f"it does not run: {type(error).__name__}: {error}") from error

    def larger(height: int, width: int) -> list[tuple[Tensor, Record]]:
        # Vectors (N, K) and clips (N, T, C, H, W) are longer as well.
        x = images(few, *{2: (height,), 4: (height, width), 5: (2, 0, height, width)}[len(size)])
        try:
            return [(x, record(model, (x,), known=_is_leaf))]
        except Exception:  # a size that is not taken
            return []

    found = larger(33, 65) or larger(32, 64)  # even sizes only if the model refuses odd ones
    if found:
        found += [run for more in _PARITIES for run in larger(*more)]
        try:
            graph = _write(model, [*runs, *(run for _, run in found)])
            _require_same(graph, model, [*inputs, *(x for x, _ in found)])
            return graph
        except Exception:  # it takes another way through the code
            pass
    graph = _write(model, runs)
    _require_same(graph, model, inputs)
    vars(graph)["fixed_size"] = tuple(inputs[0].shape[1:])
    return graph


def _is_leaf(module: nn.Module) -> bool:
    return is_describable(module) and not (hooks_of(module) or has_own_hooks(module) or is_computed(module))


def _require_same(graph: GraphNet, model: nn.Module, inputs: list[Tensor]) -> None:
    model.eval()  # the two share their layers, and a train() of the model's own may set some otherwise
    wanted = [run_seeded(model, as_inputs(x)) for x in inputs]
    graph.eval()
    for x, of_model in zip(inputs, wanted, strict=True):
        try:
            result = run_seeded(graph, as_inputs(x))
        except Exception as error:  # of an operation that cannot be called with what was recorded
            raise NoGraph(f"the graph does not run: {type(error).__name__}: {error}") from error
        if not distance(result, of_model) <= 1e-5:
            raise NoGraph("the graph computes something else")


def _write(model: nn.Module, runs: list[Record]) -> GraphNet:
    if len({len(run.nodes) for run in runs}) > 1 or any(
        len({(node.op, node.scope) for node in nodes}) > 1 for nodes in zip(*(run.nodes for run in runs), strict=True)
    ):
        raise NoGraph("another batch or image size takes another way through its code")
    return _Writer(model, runs).write()


class _Writer:
    def __init__(self, model: nn.Module, runs: list[Record]) -> None:
        self.model, self.runs = model, runs
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: dict[Value, fx.Node] = {}
        self.state = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        self.constants = 0

    def write(self) -> GraphNet:
        self.needed = self._needed()
        for nodes in zip(*(run.nodes for run in self.runs), strict=True):
            self._emit(nodes)
        self.graph.lint()
        result = GraphNet(self.root, self.graph, type(self.model).__name__)
        for module in result.modules():
            if getattr(module, "inplace", False) is True:  # another node may read what it would overwrite
                module.inplace = False  # type: ignore[assignment]
        return result.eval()

    def _needed(self) -> set[Node]:
        found: set[Node] = set()
        for node in reversed(self.runs[0].nodes):
            if node.op in ("output", "input") or any(user in found for v in node.outputs for user in v.users):
                found.add(node)
        return found

    def _emit(self, nodes: tuple[Node, ...]) -> None:
        node = nodes[0]
        if node not in self.needed:
            return
        if node.op == "input":
            for index, value in enumerate(node.outputs):
                self.nodes[value] = self.graph.placeholder("input" if index == 0 else f"input_{index}")
        elif node.op == "output":
            structures = [run.structure for run in self.runs]
            self.graph.output(self._argument(structures, nodes))
        elif node.op == "same":
            self.nodes[node.outputs[0]] = self._read(node.inputs[0], nodes, 0)
        elif node.op == "overwritten":
            raise NoGraph("it changes a view of a tensor in place")
        else:
            self._call(nodes)

    def _call(self, nodes: tuple[Node, ...]) -> None:
        node = nodes[0]
        args = self._argument([n.args for n in nodes], nodes)
        kwargs = {key: self._argument([n.kwargs[key] for n in nodes], nodes) for key in node.kwargs}
        if node.op == CALL:
            if node.scope not in dict(self.root.named_modules()):
                set_module(self.root, node.scope, self.model.get_submodule(node.scope))
            new = self.graph.call_module(node.scope, args, kwargs)
        else:
            new = self.graph.call_function(_functional(node), args, kwargs)
        for value, place in zip(node.outputs, node.places, strict=True):
            self.nodes[value] = new
            for key in place:
                self.nodes[value] = self.graph.call_function(operator.getitem, (self.nodes[value], key))

    # -- arguments -------------------------------------------------------------------------------------

    def _argument(self, found: list[Any], nodes: tuple[Node, ...]) -> Any:
        """One argument, given as each run has it."""
        first = found[0]
        if isinstance(first, Value):
            index = nodes[0].inputs.index(first)
            return self._read(first, nodes, index)
        if isinstance(first, (list, tuple)):
            if len({len(f) for f in found}) > 1:
                raise NoGraph("its arguments depend on the image's size")
            parts = [self._argument(list(part), nodes) for part in zip(*found, strict=True)]
            return parts if isinstance(first, list) else tuple(parts)
        if isinstance(first, dict):
            return {key: self._argument([f[key] for f in found], nodes) for key in first}
        if all(type(f) is type(first) and f == first for f in found):
            return first
        if isinstance(first, int) and not isinstance(first, bool):
            return self._size(found, nodes)
        raise NoGraph(f"its arguments depend on the image's size: {first!r}")

    def _size(self, found: list[int], nodes: tuple[Node, ...]) -> Any:
        """A number that is a dimension of an input, or a multiple or fraction of one."""
        places = [n.inputs for n in nodes], [run.inputs for run in self.runs]
        for exact in (True, False):
            for values in places:
                for index in range(len(values[0])):
                    for dim in range(values[0][index].tensor.dim()):
                        sizes = [v[index].tensor.shape[dim] for v in values]
                        ratio = Fraction(found[0], sizes[0]) if sizes[0] else Fraction(0)
                        fits = all(f * sizes[0] == s * found[0] for f, s in zip(found, sizes, strict=True))
                        if fits and len(set(sizes)) > 1 and (ratio == 1 or not exact):
                            value = values[0][index]
                            node = self.graph.call_method("size", (self.nodes[value], dim))
                            if ratio.numerator != 1:
                                node = self.graph.call_function(operator.mul, (node, ratio.numerator))
                            if ratio.denominator != 1:
                                node = self.graph.call_function(operator.floordiv, (node, ratio.denominator))
                            return node
        raise NoGraph("it computes with the image's size")

    def _read(self, value: Value, nodes: tuple[Node, ...], index: int) -> fx.Node:
        if value in self.nodes:
            return self.nodes[value]
        if not value.is_constant or value.node is not None:
            raise NoGraph("it uses a tensor that no recorded operation made")
        others = [node.inputs[index].tensor for node in nodes[1:]]
        if any(t.shape != value.tensor.shape or not torch.equal(t, value.tensor) for t in others):
            raise NoGraph("a constant of its code depends on the image's size")
        self.nodes[value] = self._constant(value)
        return self.nodes[value]

    def _constant(self, value: Value) -> fx.Node:
        name, tensor = value.name, value.tensor
        if not name:
            name, self.constants = f"constant_{self.constants}", self.constants + 1
        else:
            tensor = self.state[name]
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


def _functional(node: Node) -> Any:
    """The operation itself, or the one that writes its result into a new tensor."""
    func = node.func
    if func.namespace != "aten":
        return func
    name = func._schema.name.split("::")[1]
    if not func._schema.is_mutable:
        return func
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    types = [argument.type for argument in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        same = [argument.type for argument in found._schema.arguments] == types
        if same and not found._schema.is_mutable:
            return found
    raise NoGraph(f"it works in place, by {name}")
