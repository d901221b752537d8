"""Transposed convolutions as what a plan has: a convolution that makes the pixels of each tile, and a pixel shuffle.

With stride s, output pixel s * v + q sums input pixels v + (q + p) // s - m times weights (q + p) % s + s * m over m.
So each of the s phases q is a convolution, and all of them together one with s * s times the outputs, whose kernel
spans all their offsets; where a phase has no weight it holds zeros. A NaN or an infinity in the input reaches the
output pixels of all phases under that kernel, in PyTorch only those of its own weights.
"""

from __future__ import annotations

from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from gatedconv.engine.idioms import aten, operation_of
from gatedconv.engine.layers import size_of


class Span(NamedTuple):
    """The convolution along one dimension.

    Attributes:
        kernel: its size.
        before: zeros in front of the input.
        behind: zeros after it.
        weights: for each weight of the transposed convolution its phase, its index, and its index in the kernel.
    """

    kernel: int
    before: int
    behind: int
    weights: list[tuple[int, int, int]]


def span_of(kernel: int, stride: int, padding: int, output_padding: int) -> Span | None:
    """The convolution along one dimension; None where its output would be part of a tile or have to be cropped."""
    tiles, rest = divmod(kernel + output_padding - 2 * padding - stride, stride)  # tiles, less the input's pixels
    offsets = [
        (q, (q + padding) % stride + stride * m, (q + padding) // stride - m)
        for q in range(stride)
        for m in range(kernel)
        if (q + padding) % stride + stride * m < kernel
    ]
    low, high = min(o for _, _, o in offsets), max(o for _, _, o in offsets)
    if rest or low > 0 or tiles + high < 0:
        return None
    return Span(high - low + 1, -low, tiles + high, [(q, t, o - low) for q, t, o in offsets])


def as_convolution(weight: Tensor, groups: int, rows: Span, columns: Span, stride: int) -> Tensor:
    """(C_in, C_out / groups, kh, kw) -> (C_out * stride^2, C_in / groups, KH, KW), as a pixel shuffle reads it."""
    inside = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # groups, out, in, kh, kw
    out, read = inside.shape[1:3]
    wide = weight.new_zeros(groups, out, stride, stride, read, rows.kernel, columns.kernel)
    for y, top, to_y in rows.weights:
        for x, left, to_x in columns.weights:
            wide[:, :, y, x, :, to_y, to_x] = inside[..., top, left]
    return wide.flatten(0, 3)


def split_transposed(traced: fx.GraphModule) -> None:
    """Write the transposed convolutions of constant weights that `span_of` takes as a convolution and a shuffle."""
    for node in list(traced.graph.nodes):
        if operation_of(node) is not aten.convolution or not node.args[6] or len(size_of(node) or ()) != 4:
            continue
        x, weight, bias, strides, padding, dilation, _, output_padding, groups = node.args
        given = [one for one in (weight, bias) if one is not None]
        if set(dilation) != {1} or len(set(strides)) != 1 or any(one.op != "get_attr" for one in given):
            continue
        stride, tensors = strides[0], [attrgetter(str(one.target))(traced).detach() for one in given]
        sizes = zip(tensors[0].shape[2:], padding, output_padding, strict=True)
        rows, columns = (span_of(kernel, stride, *others) for kernel, *others in sizes)
        if rows is None or columns is None:
            continue
        pixels = (size_of(x) or ())[2:]
        if any(max(one.before, one.behind) >= d for one, d in zip((rows, columns), pixels, strict=True)):
            continue  # most of its products would be with zeros around the map
        constants = [as_convolution(tensors[0], groups, rows, columns, stride)]
        constants += [one.repeat_interleave(stride**2) for one in tensors[1:]]
        with traced.graph.inserting_before(node):
            names = [_constant(traced, one) for one in constants]
            if rows.before != rows.behind or columns.before != columns.behind:
                x = _call(node, aten.constant_pad_nd.default, x, [*columns[1:3], *rows[1:3]])
                rows, columns = rows._replace(before=0), columns._replace(before=0)
            window = [1, 1], [rows.before, columns.before], [1, 1], False, [0, 0], groups
            made = _call(node, aten.convolution.default, x, *names, *[None] * (2 - len(names)), *window)
            made = _call(node, aten.pixel_shuffle.default, made, stride) if stride > 1 else made
        node.replace_all_uses_with(made)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _constant(traced: fx.GraphModule, tensor: Tensor) -> fx.Node:
    name = next(name for i in count() if not hasattr(traced, name := f"constant_tile_{i}"))
    traced.register_buffer(name, tensor, persistent=False)
    node = traced.graph.get_attr(name)
    node.meta["tensor_meta"] = tensor.to("meta")
    return node


def _call(node: fx.Node, function: Any, *args: Any) -> fx.Node:
    """A call in a node's place, with the shapes of its result."""
    made = node.graph.call_function(function, args)
    made.meta.update(node.meta)
    dtype = node.meta["tensor_meta"].dtype
    for larger in (False, True):
        if larger and size_of(args[0], larger) is None:
            continue

        def empty(read: fx.Node, larger: bool = larger) -> Tensor:
            size = size_of(read, larger) or size_of(read)
            assert size is not None
            return torch.empty(size, dtype=dtype, device="meta")

        result = function(*fx.node.map_arg(args, empty))
        if larger:
            made.meta["larger_shape"] = tuple(result.shape)
        else:
            made.meta["tensor_meta"] = result
    return made
