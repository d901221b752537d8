"""A model's forward as a graph of torch.nn modules and ATen functions, from runs of its code at several sizes."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import combinations, count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from gatedconv._io import first_line
from gatedconv.convert.install import computing_all_samples, hooks_of
from gatedconv.convert.record import CALL, Node, Record, Value, has_own_hooks, is_computed, record
from gatedconv.convert.verify import as_inputs, distance, run_seeded
from gatedconv.deploy.graph_format import is_describable, set_module
from gatedconv.deploy.graph_views import ViewWriter
from gatedconv.nn import GraphNet

# Pixels more in height and width: of odd numbers, else of even ones, which pyramids of five or of six levels take.
_LARGER = ((33, 65), (32, 64), (64, 128))
# A padding may depend on whether a map's size is even; 2**n more pixels change that behind n layers of stride 2, and
# not before. Here n is 1 to 4 in one direction or the other, 1 and 2 in both.
_PARITIES = ((2, 16), (4, 2), (8, 4))
_NUMBERS = ("_local_scalar_dense", "equal")  # operations that give the model's code numbers of a tensor
_RESHAPES = ("view", "_unsafe_view")
_COMPARISONS = frozenset("gt_ ge_ lt_ le_ eq_ ne_ logical_and_ logical_or_ logical_xor_ logical_not_".split())


class NoGraph(ValueError):
    """The model's forward cannot be written as a graph."""


@torch.no_grad()
def write_graph(
    model: nn.Module,
    size: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    leaves: tuple[type[nn.Module], ...] | None = None,
    check: bool = True,
) -> GraphNet:
    """The eval-mode graph of a model of one input, for any batch and, where its code allows it, any size.

    The ``meta`` of its nodes has a tensor's shape and dtype for two images of the given size ("tensor_meta", on the
    meta device), where the model takes other sizes its shape for larger ones ("larger_shape"), and the module without
    children in whose forward it was made ("path"). The attribute ``returned`` is what the model returned for two
    images, of the classes that it has there; the graph returns tuples, lists and dicts.

    Args:
        model: it is copied.
        size: of images (N, C, H, W), vectors (N, K) or clips (N, T, C, H, W) that it takes; of another batch where
            its code needs a multiple of N.
        dtype: of its input.
        leaves: classes whose modules stay modules; None: all layers that a file can describe.
        check: compare the graph with the model; costs two forwards of each for each of eight sizes.

    Raises:
        NoGraph: what it computes depends on the batch size or on numbers that its code reads, changes views in place
            in a way that has no other form, or cannot be run.
    """
    model = copy.deepcopy(model).cpu()
    model.eval()
    with computing_all_samples():
        try:
            return _graph_of(model, size, dtype, (2, 3), leaves, check)
        except NoGraph:
            if size[0] < 2:
                raise
        return _graph_of(model, size, dtype, (size[0], 2 * size[0]), leaves, check)


def _graph_of(
    model: nn.Module,
    size: tuple[int, ...],
    dtype: torch.dtype,
    counts: tuple[int, int],
    leaves: tuple[type[nn.Module], ...] | None,
    check: bool,
) -> GraphNet:
    generator = torch.Generator().manual_seed(0)

    @functools.cache
    def without_numbers() -> nn.Module:
        return copy.deepcopy(model).to("meta")

    def run(count: int, *more: int) -> tuple[Tensor, Record]:
        kept = len(size) - 1 - len(more)
        shape = (*size[1 : 1 + kept], *(n + m for n, m in zip(size[1 + kept :], more, strict=True)))
        x = torch.rand(count, *shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        if runs:
            try:  # on the meta device, where it costs next to nothing
                found = _recorded(without_numbers(), x.to("meta"), leaves)
                if _is_alike(found, runs[0][1]):
                    return x, found
            except Exception:  # code or operations that need them
                pass
        return x, _recorded(model, x, leaves)

    def taken(number: int, *more: int) -> list[tuple[Tensor, Record]]:
        try:
            return [run(number, *more)]
        except Exception:  # a size that is not taken
            return []

    def grown(height: int, width: int) -> tuple[int, ...]:
        # Vectors (N, K) and clips (N, T, C, H, W) are longer as well.
        return {2: (height,), 4: (height, width), 5: (2, 0, height, width)}[len(size)]

    runs: list[tuple[Tensor, Record]] = []
    try:
        for number in counts:
            runs.append(run(number))
    except Exception as error:  # whatever the model's code raises
        raise NoGraph(f"it does not run: {type(error).__name__}: {first_line(error)}") from error
    alone = taken(1)
    found = next((each for more in _LARGER if (each := taken(counts[0], *grown(*more)))), [])
    found += [each for more in _PARITIES for each in taken(counts[0], *grown(*more))]
    found += taken(counts[0], *(-(n // 2) for n in size[-2:])) if len(size) == 4 else []
    if found:
        try:
            return _write(model, [*runs, *found, *alone], check, len(runs))
        except Exception:  # it takes another way through the code
            pass
    try:
        graph = _write(model, [*runs, *alone], check)
    except (KeyError, IndexError, TypeError) as error:  # runs of one way whose operations have other arguments
        raise NoGraph("another batch takes another way through its code") from error
    vars(graph)["fixed_size"] = tuple(runs[0][0].shape[1:])
    return graph


def _recorded(model: nn.Module, x: Tensor, leaves: tuple[type[nn.Module], ...] | None) -> Record:
    found = record(model, (x,), known=lambda module: module is not model and _is_leaf(module, leaves))
    _keep_shapes(found)
    return found


def _is_alike(found: Record, first: Record) -> bool:
    """Whether a run on the meta device went the way of the first run, and read no constants made there."""
    read = tree_flatten([(node.args, node.kwargs) for node in found.nodes])[0]
    there = any(item == torch.device("meta") if isinstance(item, torch.device) else _is_there(item) for item in read)
    return not there and [_step(node) for node in found.nodes] == [_step(node) for node in first.nodes]


def _is_there(item: Any) -> bool:
    return isinstance(item, Value) and item.numbers is not None and item.numbers.is_meta


def _step(node: Node) -> tuple[str, str, int]:
    return node.op, node.scope, len(node.outputs)


def _is_leaf(module: nn.Module, leaves: tuple[type[nn.Module], ...] | None) -> bool:
    known = is_describable(module) if leaves is None else type(module) in leaves
    changed = hooks_of(module) or has_own_hooks(module) or is_computed(module) or "forward" in vars(module)
    return known and not changed


def _keep_shapes(found: Record) -> None:
    """Forget the numbers of what was computed: six runs of a large network would fill the memory."""
    for node in found.nodes:
        for value in node.outputs:
            value.tensor = torch.empty(value.tensor.shape, dtype=value.tensor.dtype, device="meta")


def _require_same(graph: GraphNet, model: nn.Module, inputs: list[Tensor]) -> None:
    model.eval()  # the two share their layers, and a train() of the model's own may set some otherwise
    wanted = [run_seeded(model, as_inputs(x)) for x in inputs]
    graph.eval()
    for x, of_model in zip(inputs, wanted, strict=True):
        try:
            result = run_seeded(graph, as_inputs(x))
        except Exception as error:  # of an operation that cannot be called with what was recorded
            raise NoGraph(f"the graph does not run: {type(error).__name__}: {first_line(error)}") from error
        if not distance(result, of_model) <= 1e-5:
            raise NoGraph("the graph computes something else")


def _write(model: nn.Module, runs: list[tuple[Tensor, Record]], check: bool, larger: int | None = None) -> GraphNet:
    """The graph that all runs agree on; ``larger`` is the run that has the shapes for larger images."""
    records = [found for _, found in runs]
    if records[0].gave_numbers or any(node.op in _NUMBERS and not node.is_constant for node in records[0].nodes):
        raise NoGraph("its code reads numbers of a tensor, on which what it does may depend")
    if len({len(found.nodes) for found in records}) > 1 or any(
        len({_step(node) for node in nodes}) > 1 for nodes in zip(*(found.nodes for found in records), strict=True)
    ):
        raise NoGraph("another batch or image size takes another way through its code")
    graph = _Writer(model, records, larger).write()
    if check:
        _require_same(graph, model, [x for x, _ in runs])
    return graph


class _Writer:
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
        found = None if views is None else self.views.write(*views, self.nodes[result])
        if found is None:
            raise NoGraph("it changes a view of a tensor in place")
        return found

    # -- arguments -------------------------------------------------------------------------------------

    def _arguments(self, nodes: tuple[Node, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        node = nodes[0]
        if node.op in _RESHAPES and isinstance(node.args[1], (list, tuple)):
            source = self._argument([n.args[0] for n in nodes], nodes)
            return (source, self._sizes([n.args[1] for n in nodes], nodes)), {}
        args = self._argument([n.args for n in nodes], nodes)
        return args, {key: self._argument([n.kwargs[key] for n in nodes], nodes) for key in node.kwargs}

    def _sizes(self, found: list[list[int]], nodes: tuple[Node, ...]) -> list[Any]:
        """What a tensor is reshaped to; the one size that follows from the others may be any number."""
        if len({len(f) for f in found}) > 1:
            raise NoGraph("its arguments depend on the image's size")
        sizes: list[Any] = []
        for each in zip(*found, strict=True):
            try:
                sizes.append(self._argument(list(each), nodes))
            except NoGraph:
                sizes.append(-1)
        if sizes.count(-1) > 1:
            raise NoGraph("it computes with the image's size")
        return sizes

    def _argument(self, found: list[Any], nodes: tuple[Node, ...]) -> Any:
        """One argument, given as each run has it."""
        first = found[0]
        if isinstance(first, Value):
            _require_one_source(found)
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

    def _size(self, found: list[int], nodes: tuple[Node, ...]) -> fx.Node:
        """A number that is a dimension of a tensor, or a multiple or fraction of one, or a product of two."""
        read = nodes[0].inputs
        shapes = [[n.inputs[i].tensor.shape for n in nodes] for i in range(len(read))]
        inputs = [(self.nodes[v], shape) for v, shape in zip(read, shapes, strict=True) if v in self.nodes]
        written = list(self.shapes.items())
        for node, dim, sizes in _dimensions([*inputs, *reversed(written)]):
            if sizes == found:
                return self.graph.call_method("size", (node, dim))
        for node, dim, sizes in _dimensions([*inputs, *written[: len(self.runs[0].inputs)]]):
            part = _fraction(found, sizes)
            if part is not None:
                result = self.graph.call_method("size", (node, dim))
                if part.numerator != 1:
                    result = self.graph.call_function(operator.mul, (result, part.numerator))
                if part.denominator != 1:
                    result = self.graph.call_function(operator.floordiv, (result, part.denominator))
                return result
        for one, other in combinations(_dimensions(inputs), 2):
            if [a * b for a, b in zip(one[2], other[2], strict=True)] == found:
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


def _require_one_source(found: Iterable[Any]) -> None:
    """NoGraph unless every run reads the same value; `_read` compares the numbers of constants without a name."""

    def source(value: Any) -> Any:
        if not isinstance(value, Value):
            return None
        return -1 if value.node is None else value.node.order, value.index, value.name

    if len({source(value) for value in found}) > 1:
        raise NoGraph("which tensors it computes with depends on the image's size")


def _dimensions(
    shapes: Iterable[tuple[fx.Node, list[torch.Size]]],
) -> Iterator[tuple[fx.Node, int, list[int]]]:
    """Every dimension of some tensors, with its size in every run."""
    for node, of_runs in shapes:
        for dim, sizes in enumerate(zip(*of_runs, strict=False)):
            yield node, dim, list(sizes)


def _fraction(found: list[int], sizes: list[int]) -> Fraction | None:
    """What sizes are multiplied by, and rounded down, to give some numbers; None where nothing does."""
    if found[0] and sizes[0] and all(f * sizes[0] == s * found[0] for f, s in zip(found, sizes, strict=True)):
        return Fraction(found[0], sizes[0])
    if not all(found) or len(set(found)) < 3:  # such as a padding, which may be right for the wrong reason
        return None
    parts = round(max(sizes) / max(found))
    return Fraction(1, parts) if parts > 1 and all(f == s // parts for f, s in zip(found, sizes, strict=True)) else None


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
