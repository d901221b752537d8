"""The masked convolution on compact tensors: closed channels are removed, PyTorch convolves the rest.

Everything here is differentiable PyTorch, the backward included, so second derivatives are right by
construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedconv.ops._masked_conv2d_args import Conv, conv_memory_format

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Compact(NamedTuple):
    """A convolution after removal.

    Attributes:
        input: (N, inputs left, H + padding, W + padding); padded here where the two sides differ.
        weight: (rows left, inputs left / groups, KH, KW).
        rows: int64 index of the outputs left, None for all.
        cols: int64 index of the inputs left, None for all.
        groups: Number of groups left.
        padding: What the convolution still has to pad, vertically and horizontally.
        partial: Whether closed channels are among those left, as zeros: a group is kept or removed as a whole.
    """

    input: Tensor
    weight: Tensor
    rows: Tensor | None
    cols: Tensor | None
    groups: int
    padding: tuple[int, int]
    partial: bool


def compact_forward(conv: Conv) -> Tensor:
    """Compute `masked_conv2d` by one convolution of the open channels."""
    out_open, residual, geometry = conv.out_open, conv.residual, conv.geometry
    left = _remove(conv)
    if left.rows is not None and left.rows.numel() == 0:
        out = conv.input.new_zeros(geometry.output_shape) if residual is None else residual.clone()
    else:
        bias = None if conv.bias is None else _take(conv.bias, left.rows, 0)
        out = F.conv2d(left.input, left.weight, bias, geometry.stride, left.padding, geometry.dilation, left.groups)
        if left.partial or out_open.dim() == 2:
            out = torch.where(_take(_spread(out_open), left.rows, 1), out, 0)
        if residual is None:
            out = _put(out, left.rows, geometry.output_shape[1], 1)
        else:
            out = residual + out if left.rows is None else residual.index_add(1, left.rows, out)
    out = torch.relu(out) if conv.relu else out
    return out.contiguous(memory_format=conv_memory_format(conv.input, conv.weight))


def compact_backward(grad: Tensor, conv: Conv, output: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """Compute the gradients of input, weight, bias and residual from the open channels alone.

    Args:
        grad: Gradient of the output, (N, C_out, P, Q).
        conv: The forward's arguments; its bias and residual are not read, ``in_open`` is (C_in,) or None.
        output: The forward's output where it ended in a ReLU, else None.
        needs: Which of the four gradients are needed.

    Returns:
        The four gradients, None where not needed; closed rows and closed inputs are exact zeros.
    """
    weight, out_open, in_open, groups = conv.weight, conv.out_open, conv.in_open, conv.geometry.groups
    if output is not None:
        grad = torch.where(output > 0, grad, 0)
    to_residual = grad if needs[3] else None
    if not any(needs[:3]):
        return None, None, None, to_residual
    if out_open.dim() == 2 and needs[1]:
        conv = conv._replace(input=without_closed_samples(conv.input, out_open, groups))
    left = _remove(conv)
    if left.partial or out_open.dim() == 2:
        grad = torch.where(_spread(out_open), grad, 0)
    to_input, to_weight, to_bias = _convolution_backward(_take(grad, left.rows, 1), left, conv, needs)
    if to_input is not None:
        if to_input.shape[2:] != conv.input.shape[2:]:  # `_remove` padded the input
            to_input = _crop(to_input, conv)
        to_input = _put(to_input, left.cols, conv.input.shape[1], 1)
        if left.partial and in_open is not None:
            to_input = to_input.masked_fill(~in_open[:, None, None], 0)
    if to_weight is not None:
        if groups == 1:
            to_weight = _put(to_weight, left.cols, weight.shape[1], 1)
        to_weight = _put(to_weight, left.rows, weight.shape[0], 0)
        if left.partial and in_open is not None:
            to_weight = to_weight.masked_fill(_closed_taps(weight, in_open, groups), 0)
    if to_bias is not None:
        to_bias = _put(to_bias, left.rows, weight.shape[0], 0)
    return to_input, to_weight, to_bias, to_residual


def _convolution_backward(
    grad: Tensor, left: _Compact, conv: Conv, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, geometry = grad.shape[1], conv.geometry
    if rows == 0 or grad.shape[0] == 0:
        parts = (left.input, left.weight, left.weight.new_empty(rows))
        zeros = [torch.zeros_like(part) if need else None for part, need in zip(parts, needs, strict=False)]
        return zeros[0], zeros[1], zeros[2]
    numbers = (geometry.stride, left.padding, geometry.dilation, False, [0, 0], left.groups)
    gradients = torch.ops.aten.convolution_backward(grad, left.input, left.weight, [rows], *numbers, list(needs[:3]))
    # With oneDNN the gradient of a bias comes with that of the weight, needed or not.
    made = [part if need else None for part, need in zip(gradients, needs, strict=False)]
    return made[0], made[1], made[2]


def _remove(conv: Conv) -> _Compact:
    """Remove closed outputs and inputs."""
    input, weight, _, out_open, in_open, *_ = conv
    rows_open = out_open if out_open.dim() == 1 else out_open.any(0)
    groups = conv.geometry.groups
    nothing_read = in_open is not None and not bool(in_open.any())
    partial = groups > 1 or nothing_read
    if partial:
        # Removal inside a group would leave groups of unequal size; a convolution of no inputs does not exist.
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
    top, bottom, left, right = conv.geometry.padding
    padding = (top, left)
    input = _take(input, cols, 1)
    if top != bottom or left != right:
        input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
    return _Compact(input, _take(weight, rows, 0), rows, cols, groups, padding, partial)


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


def _crop(padded: Tensor, conv: Conv) -> Tensor:
    """The part of a padded map where the input is."""
    top, _, left, _ = conv.geometry.padding
    height, width = conv.input.shape[2:]
    return padded[:, :, top : top + height, left : left + width]


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
