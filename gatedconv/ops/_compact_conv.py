"""The masked convolution on cut tensors: closed channels are taken out, PyTorch convolves the rest.

Everything here is differentiable PyTorch, the backward included, so second derivatives are right by
construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.ops._conv_args import ConvArguments
from gatedconv.ops._memory_format import conv_memory_format

__all__ = ["Gradients", "cut_backward", "cut_forward", "without_closed_samples"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Cut:
    """What is left of a convolution.

    Attributes:
        input: (N, inputs left, H + padding, W + padding); padded here where the two sides differ.
        weight: (rows left, inputs left / groups, KH, KW).
        rows: int64 index of the outputs left, None for all.
        cols: int64 index of the inputs left, None for all.
        groups: Number of groups left.
        padding: What the convolution still has to pad, vertically and horizontally.
        partial: Whether closed channels are among those left, as zeros: a group is kept or dropped as a
            whole.
    """

    input: Tensor
    weight: Tensor
    rows: Tensor | None
    cols: Tensor | None
    groups: int
    padding: tuple[int, int]
    partial: bool


def cut_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None,
    residual: Tensor | None,
    arguments: ConvArguments,
    relu: bool,
) -> Tensor:
    """Compute `masked_conv2d` by one convolution of the open channels; arguments are checked already."""
    cut = _cut(input, weight, out_open, in_open, arguments)
    if cut.rows is not None and cut.rows.numel() == 0:
        out = input.new_zeros(arguments.output_shape) if residual is None else residual.clone()
    else:
        bias = None if bias is None else _take(bias, cut.rows, 0)
        out = F.conv2d(cut.input, cut.weight, bias, arguments.stride, cut.padding, arguments.dilation, cut.groups)
        if cut.partial or out_open.dim() == 2:
            out = torch.where(_take(_spread(out_open), cut.rows, 1), out, 0)
        if residual is None:
            out = _put(out, cut.rows, arguments.output_shape[1], 1)
        else:
            out = residual + out if cut.rows is None else residual.index_add(1, cut.rows, out)
    out = torch.relu(out) if relu else out
    return out.contiguous(memory_format=conv_memory_format(input, weight))


def cut_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    out_open: Tensor,
    in_open: Tensor | None,
    output: Tensor | None,
    arguments: ConvArguments,
    needs: Sequence[bool],
) -> Gradients:
    """Compute the gradients of input, weight, bias and residual from the open channels alone.

    Args:
        grad: Gradient of the output, (N, C_out, P, Q).
        input: (N, C_in, H, W).
        weight: (C_out, C_in / groups, KH, KW).
        out_open: bool (C_out,) or (N, C_out).
        in_open: bool (C_in,), or None.
        output: The forward's output where it ended in a ReLU, else None.
        arguments: The forward's.
        needs: Which of the four gradients are wanted.

    Returns:
        The four gradients, None where not wanted; closed rows and closed inputs are exact zeros.
    """
    if output is not None:
        grad = torch.where(output > 0, grad, 0)
    to_residual = grad if needs[3] else None
    if not any(needs[:3]):
        return None, None, None, to_residual
    if out_open.dim() == 2 and needs[1]:
        input = without_closed_samples(input, out_open, arguments.groups)
    cut = _cut(input, weight, out_open, in_open, arguments)
    if cut.partial or out_open.dim() == 2:
        grad = torch.where(_spread(out_open), grad, 0)
    to_input, to_weight, to_bias = _convolution_backward(_take(grad, cut.rows, 1), cut, arguments, needs)
    if to_input is not None:
        to_input = _put(_crop(to_input, cut, input), cut.cols, input.shape[1], 1)
        if cut.partial and in_open is not None:
            to_input = to_input.masked_fill(~in_open[:, None, None], 0)
    if to_weight is not None:
        if arguments.groups == 1:
            to_weight = _put(to_weight, cut.cols, weight.shape[1], 1)
        to_weight = _put(to_weight, cut.rows, weight.shape[0], 0)
        if cut.partial and in_open is not None:
            to_weight = to_weight.masked_fill(_closed_taps(weight, in_open, arguments.groups), 0)
    if to_bias is not None:
        to_bias = _put(to_bias, cut.rows, weight.shape[0], 0)
    return to_input, to_weight, to_bias, to_residual


def _convolution_backward(
    grad: Tensor, cut: _Cut, arguments: ConvArguments, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = grad.shape[1]
    if rows == 0 or grad.shape[0] == 0:
        parts = (cut.input, cut.weight, cut.weight.new_empty(rows))
        zeros = [torch.zeros_like(part) if need else None for part, need in zip(parts, needs, strict=False)]
        return zeros[0], zeros[1], zeros[2]
    gradients = torch.ops.aten.convolution_backward(
        grad,
        cut.input,
        cut.weight,
        [rows],
        arguments.stride,
        cut.padding,
        arguments.dilation,
        False,
        [0, 0],
        cut.groups,
        list(needs[:3]),
    )
    # With oneDNN a wanted bias brings an unwanted weight along.
    made = [part if need else None for part, need in zip(gradients, needs, strict=False)]
    return made[0], made[1], made[2]


def _cut(input: Tensor, weight: Tensor, out_open: Tensor, in_open: Tensor | None, arguments: ConvArguments) -> _Cut:
    rows_open = out_open if out_open.dim() == 1 else out_open.any(0)
    groups = arguments.groups
    nothing_read = in_open is not None and not bool(in_open.any())
    partial = groups > 1 or nothing_read
    if partial:
        # Cutting inside a group would leave groups of unequal size; a convolution of no inputs does not
        # exist.
        weight = torch.where(rows_open[:, None, None, None], weight, 0)
        if in_open is not None:
            input = torch.where(in_open[:, None, None], input, 0)
            weight = weight.masked_fill(_closed_taps(weight, in_open, groups), 0)
    if groups > 1:
        kept = rows_open.view(groups, -1).any(1)
        rows = _index(kept.repeat_interleave(weight.shape[0] // groups))
        cols = _index(kept.repeat_interleave(weight.shape[1]))
        groups = int(kept.sum())
    else:
        rows = _index(rows_open)
        cols = None if in_open is None or nothing_read else _index(in_open)
        weight = _take(weight, cols, 1)
    top, bottom, left, right = arguments.padding
    padding = (top, left)
    input = _take(input, cols, 1)
    if top != bottom or left != right:
        input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
    return _Cut(input, _take(weight, rows, 0), rows, cols, groups, padding, partial)


def without_closed_samples(tensor: Tensor, out_open: Tensor, groups: int) -> Tensor:
    """Zero what no open output of its sample and group reads: a gradient of 0 times a NaN there would be NaN.

    Args:
        tensor: (N, C_in, H, W).
        out_open: bool (N, C_out).
        groups: Number of groups.

    Returns:
        (N, C_in, H, W).
    """
    read = out_open.view(out_open.shape[0], groups, out_open.shape[1] // groups).any(2)
    read = read.repeat_interleave(tensor.shape[1] // groups, 1)
    return torch.where(read[:, :, None, None], tensor, 0)


def _closed_taps(weight: Tensor, in_open: Tensor, groups: int) -> Tensor:
    """Spread the closed inputs of each group over its rows: bool (C_out, C_in / groups, 1, 1)."""
    by_group = ~in_open.view(groups, -1)
    return by_group.repeat_interleave(weight.shape[0] // groups, 0)[:, :, None, None]


def _spread(mask: Tensor) -> Tensor:
    return mask.view(-1, mask.shape[-1], 1, 1)


def _crop(tensor: Tensor, cut: _Cut, like: Tensor) -> Tensor:
    """Take away the padding that `_cut` put around the input; what it put in front is the smaller half."""
    high, wide = tensor.shape[2] - like.shape[2], tensor.shape[3] - like.shape[3]
    top, left = high // 2, wide // 2
    return tensor[:, :, top : top + like.shape[2], left : left + like.shape[3]]


def _index(mask: Tensor) -> Tensor | None:
    index = mask.nonzero().flatten()
    return None if index.numel() == mask.numel() else index


def _take(tensor: Tensor, index: Tensor | None, dim: int) -> Tensor:
    return tensor if index is None else tensor.index_select(dim, index)


def _put(part: Tensor, index: Tensor | None, size: int, dim: int) -> Tensor:
    if index is None:
        return part
    shape = [*part.shape[:dim], size, *part.shape[dim + 1 :]]
    return part.new_zeros(shape).index_copy(dim, index, part)
