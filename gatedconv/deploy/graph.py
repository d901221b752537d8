"""A model's forward as a graph of torch.nn modules and ATen functions, from runs of its code at several sizes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gatedconv._io import first_line
from gatedconv.convert.install import computing_all_samples, hooks_of
from gatedconv.convert.module_kinds import has_own_hooks, is_computed
from gatedconv.convert.record import Node, Record, Value, record
from gatedconv.convert.verify import as_inputs, distance, run_seeded
from gatedconv.deploy.graph_format import is_describable
from gatedconv.deploy.graph_writer import GraphWriter, NoGraph
from gatedconv.gating import copied
from gatedconv.nn import GraphNet

# Pixels more in height and width: of odd numbers, else of even ones, which pyramids of five or of six levels take.
_LARGER = ((33, 65), (32, 64), (64, 128))
# A padding may depend on whether a map's size is even; 2**n more pixels change that behind n layers of stride 2, and
# not before. Here n is 1 to 4 in one direction or the other, 1 and 2 in both.
_PARITIES = ((2, 16), (4, 2), (8, 4))
# Far from the example, where only the path through the code counts: more images, and more pixels in height and width
# (a multiple of 64, so that pyramids take them).
_MANY, _FAR = 128, 960
# `distance` of a graph from its model, in any precision: both make the same calls in the same order.
GRAPH_ERROR = 1e-5


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
    model = copied(model).cpu()
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

    def shape_of(count: int, *more: int) -> tuple[int, ...]:
        kept = len(size) - 1 - len(more)
        return count, *size[1 : 1 + kept], *(n + m for n, m in zip(size[1 + kept :], more, strict=True))

    def run(count: int, *more: int) -> tuple[Tensor, Record]:
        x = torch.rand(shape_of(count, *more), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        if runs:
            try:  # on the meta device, where it costs next to nothing
                recorded = _recorded(without_numbers(), x.to("meta"), leaves)
                if _is_alike(recorded, runs[0][1]):
                    return x, recorded
            except Exception:  # code or operations that need them
                pass
        return x, _recorded(model, x, leaves)

    def taken(number: int, *more: int) -> list[tuple[Tensor, Record]]:
        try:
            return [run(number, *more)]
        except Exception:  # a size that is not taken
            return []

    def far(number: int, *more: int) -> list[tuple[Tensor, Record]]:
        """A run without numbers, of a model that takes the same path with and without them."""
        try:
            near = _recorded(without_numbers(), runs[0][0].to("meta"), leaves)
            x = torch.empty(shape_of(number, *more), dtype=dtype, device="meta")
            return [(x, _recorded(without_numbers(), x, leaves))] if _is_alike(near, runs[0][1]) else []
        except Exception:  # code or operations that need numbers, or a size that is not taken
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
    others = next((each for more in _LARGER if (each := taken(counts[0], *grown(*more)))), [])
    others += [each for more in _PARITIES for each in taken(counts[0], *grown(*more))]
    others += taken(counts[0], *(-(n // 2) for n in size[-2:])) if len(size) == 4 else []
    others += far(counts[0], _FAR, _FAR) if len(size) == 4 else []
    alone += far(_MANY * counts[0])
    if others:
        try:
            return _write(model, [*runs, *others, *alone], check, len(runs))
        except Exception:  # its code takes another path
            pass
    try:
        graph = _write(model, [*runs, *alone], check)
    except (KeyError, IndexError, TypeError) as error:  # runs of one path whose operations have other arguments
        raise NoGraph("another batch takes another way through its code") from error
    vars(graph)["fixed_size"] = tuple(runs[0][0].shape[1:])
    return graph


def _recorded(model: nn.Module, x: Tensor, leaves: tuple[type[nn.Module], ...] | None) -> Record:
    recorded = record(model, (x,), known=lambda module: module is not model and _is_leaf(module, leaves))
    _keep_shapes(recorded)
    return recorded


def _is_alike(recorded: Record, first: Record) -> bool:
    """Whether a run on the meta device took the path of the first run, and read no constants made there."""
    read = tree_flatten([(node.args, node.kwargs) for node in recorded.nodes])[0]
    there = any(item == torch.device("meta") if isinstance(item, torch.device) else _is_there(item) for item in read)
    return not there and [_step(node) for node in recorded.nodes] == [_step(node) for node in first.nodes]


def _is_there(item: Any) -> bool:
    return isinstance(item, Value) and item.numbers is not None and item.numbers.is_meta


def _step(node: Node) -> tuple[str, str, int]:
    return node.op, node.scope, len(node.outputs)


def _is_leaf(module: nn.Module, leaves: tuple[type[nn.Module], ...] | None) -> bool:
    known = is_describable(module) if leaves is None else type(module) in leaves
    changed = hooks_of(module) or has_own_hooks(module) or is_computed(module) or "forward" in vars(module)
    return known and not changed


def _keep_shapes(recorded: Record) -> None:
    """Forget the numbers of what was computed: eight runs of a large network would fill the memory."""
    for node in recorded.nodes:
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
        if not distance(result, of_model) <= GRAPH_ERROR:
            raise NoGraph("the graph computes something else")


def _write(model: nn.Module, runs: list[tuple[Tensor, Record]], check: bool, larger: int | None = None) -> GraphNet:
    """The graph that all runs agree on; ``larger`` is the run that has the shapes for larger images."""
    records = [recorded for _, recorded in runs]
    if records[0].knows_numbers_at is not None:
        raise NoGraph("its code reads numbers of a tensor, on which what it does may depend")
    if len({len(each.nodes) for each in records}) > 1 or any(
        len({_step(node) for node in nodes}) > 1 for nodes in zip(*(each.nodes for each in records), strict=True)
    ):
        raise NoGraph("another batch or image size takes another way through its code")
    graph = GraphWriter(model, records, larger).write()
    if check:
        _require_same(graph, model, [x for x, _ in runs if not x.is_meta])
    return graph
