"""The arguments of a masked convolution: checked, and in the form that the operators take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IntPair = int | Sequence[int]


class Geometry(NamedTuple):
    """The numbers of a convolution.

    Attributes:
        stride: Vertical and horizontal step, in pixels.
        padding: Pixels of zeros at the top, bottom, left and right.
        dilation: Vertical and horizontal distance of neighboring taps.
        groups: Number of groups.
        output_shape: (N, C_out, P, Q).
    """

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    output_shape: tuple[int, int, int, int]


class Conv(NamedTuple):
    """A masked convolution whose arguments have been checked; tensors and masks as `masked_conv2d` takes them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    out_open: Tensor
    in_open: Tensor | None
    residual: Tensor | None
    geometry: Geometry
    relu: bool


def executed_macs(
    weight: Tensor, out_open: Tensor, in_open: Tensor | None, groups: int, output_shape: Sequence[int]
) -> int:
    """Multiply-accumulates of a masked convolution: those of open outputs with open inputs, over all samples.

    Args:
        weight: (C_out, C_in / groups, KH, KW).
        out_open: bool (C_out,), the same for every sample, or (N, C_out).
        in_open: bool (C_in,) or (N, C_in), or None for all open.
        groups: Number of groups.
        output_shape: (N, C_out, P, Q).
    """
    everything = torch.full((1, groups), weight.shape[1], device="cpu")
    inputs = everything if in_open is None else _open_per_group(in_open, groups)
    pairs = (_open_per_group(out_open, groups) * inputs).sum(dim=1)
    return int(pairs.expand(output_shape[0]).sum()) * math.prod((*output_shape[2:], *weight.shape[2:]))


def _open_per_group(mask: Tensor, groups: int) -> Tensor:
    """Open channels of each group: (channels,) or (N, channels) -> (1 or N, groups)."""
    rows = mask.reshape(1, -1) if mask.dim() == 1 else mask
    return rows.reshape(len(rows), groups, -1).sum(dim=2).cpu()


def check_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
    residual: Tensor | None,
    relu: bool,
) -> Conv:
    """Check everything that `masked_conv2d` is given and compute its output's shape.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong rank, size, device or number.
    """
    if not isinstance(relu, bool):
        raise TypeError(f"masked_conv2d: relu must be a bool, got {type(relu).__name__}")
    _check_tensors(input, weight, bias, residual)
    _check_masks(input, weight, out_open, in_open)
    channels = weight.shape[0]
    if bias is not None and bias.shape[0] != channels:
        raise ValueError(f"masked_conv2d: bias must have shape ({channels},), got {tuple(bias.shape)}")
    geometry = _geometry(input.shape, weight.shape, stride, padding, dilation, groups)
    if residual is not None and residual.shape != geometry.output_shape:
        raise ValueError(
            f"masked_conv2d: residual must have the output's shape {geometry.output_shape}, got {tuple(residual.shape)}"
        )
    return Conv(input, weight, bias, out_open, in_open, residual, geometry, relu)


def _geometry(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
) -> Geometry:
    steps = _pair("stride", stride, 1)
    spread = _pair("dilation", dilation, 1)
    _require_int("groups", groups, 1)
    channels, per_group = weight_shape[0], weight_shape[1]
    if per_group * groups != input_shape[1] or channels % groups != 0:
        raise ValueError(
            f"masked_conv2d: weight of shape {tuple(weight_shape)} with groups={groups} expects input with "
            f"{per_group * groups} channels and C_out divisible by groups, got input {tuple(input_shape)}"
        )
    kernel = (weight_shape[2], weight_shape[3])
    pads = _padding(padding, kernel, steps, spread)
    for axis, size in (("height", input_shape[2]), ("width", input_shape[3])):
        if size < 1 and input_shape[0] != 0:  # as PyTorch: a batch of no images may be empty otherwise, too
            raise ValueError(f"masked_conv2d: input {axis} must be at least 1, got shape {tuple(input_shape)}")
    height = _output_size("height", input_shape[2], kernel[0], pads[0] + pads[1], steps[0], spread[0])
    width = _output_size("width", input_shape[3], kernel[1], pads[2] + pads[3], steps[1], spread[1])
    return Geometry(steps, pads, spread, groups, (input_shape[0], channels, height, width))


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if residual is None and isinstance(input, Tensor) and isinstance(weight, Tensor):
        # The usual call is right; checking it tensor by tensor adds 0.9 us to a small layer's 15 (n1 i16 o16 h8 k3
        # open50, one thread of an EPYC, family 26).
        dtype, device = input.dtype, input.device
        alike = dtype == weight.dtype and device == weight.device
        alike = alike and input.layout == weight.layout == torch.strided
        if isinstance(bias, Tensor):
            alike = alike and bias.dtype == dtype and bias.device == device and bias.dim() == 1
            alike = alike and bias.layout == torch.strided
        elif bias is not None:
            alike = False
        if alike and input.dim() == weight.dim() == 4 and dtype.is_floating_point:
            return
    for name, tensor, rank in (
        ("input", input, 4),
        ("weight", weight, 4),
        ("bias", bias, 1),
        ("residual", residual, 4),
    ):
        if tensor is None and name in ("bias", "residual"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"masked_conv2d: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"masked_conv2d: {name} must be dense (torch.strided), got {tensor.layout}")
        if not tensor.is_floating_point():
            raise TypeError(f"masked_conv2d: {name} must be floating point, got {tensor.dtype}")
        if tensor.dim() != rank:
            raise ValueError(f"masked_conv2d: {name} must be {rank}-D, got shape {tuple(tensor.shape)}")
        if tensor.dtype != input.dtype:
            raise TypeError(f"masked_conv2d: {name} must have input's dtype {input.dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"masked_conv2d: {name} must be on input's device {input.device}, got {tensor.device}")


def _check_masks(input: Tensor, weight: Tensor, out_open: Tensor, in_open: Tensor | None) -> None:
    batch, in_channels, out_channels = input.shape[0], input.shape[1], weight.shape[0]
    _check_mask("out_open", out_open, [(out_channels,), (batch, out_channels)], input.device)
    if in_open is not None:
        _check_mask("in_open", in_open, [(in_channels,), (batch, in_channels)], input.device)


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]], device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"masked_conv2d: {name} must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"masked_conv2d: {name} must be a bool tensor, got {mask.dtype}")
    if mask.layout != torch.strided:
        raise TypeError(f"masked_conv2d: {name} must be dense (torch.strided), got {mask.layout}")
    if mask.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"masked_conv2d: {name} must have shape {expected}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"masked_conv2d: {name} must be on input's device {device}, got {mask.device}")


# Sums of an image's size and of both its paddings stay below 2^63.
_MOST = 2**61


def _require_int(name: str, value: object, least: int) -> None:
    # A traced size is a SymInt, which is no int.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"masked_conv2d: {name} must be an int or two of them, got {value!r}")
    if value < least:
        raise ValueError(f"masked_conv2d: {name} must be at least {least}, got {value}")
    if value > _MOST:
        raise ValueError(f"masked_conv2d: {name} must be at most {_MOST}, got {value}")


def _pair(name: str, value: IntPair, least: int) -> tuple[int, int]:
    # Without this case, the usual one, three pairs add 1.7 us to a small layer's 15, measured as above.
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        if least <= value[0] <= _MOST and least <= value[1] <= _MOST:
            return value
    if isinstance(value, (int, torch.SymInt)):
        _require_int(name, value, least)
        return (value, value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"masked_conv2d: {name} must be an int or two of them, got {value!r}")
    if len(value) not in (1, 2):
        raise ValueError(f"masked_conv2d: {name} must be an int or two of them, got {value!r}")
    for entry in value:
        _require_int(name, entry, least)
    return (value[0], value[-1])


def _padding(
    padding: IntPair | str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right; "same" puts an odd pixel at the bottom and right, as PyTorch does."""
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"masked_conv2d: padding='same' needs stride 1, got {stride}")
        total = [dilation[i] * (kernel[i] - 1) for i in (0, 1)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    if padding == "valid":
        return (0, 0, 0, 0)
    if isinstance(padding, str):
        raise ValueError(f"masked_conv2d: padding must be 'same', 'valid', an int or two of them, got {padding!r}")
    high, wide = _pair("padding", padding, 0)
    return (high, high, wide, wide)


def _output_size(axis: str, size: int, kernel: int, padding: int, stride: int, dilation: int) -> int:
    reach = dilation * (kernel - 1) + 1
    if kernel < 1 or size + padding < reach:
        raise ValueError(
            f"masked_conv2d: the padded input {axis} ({size} + {padding}) must be at least the kernel's "
            f"reach ({reach} = dilation {dilation} * ({kernel} - 1) + 1)"
        )
    return (size + padding - reach) // stride + 1


def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the format of conv2d's output: channels_last if either argument is in it."""
    if _is_channels_last(input) or _is_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format


def _is_channels_last(tensor: Tensor) -> bool:
    """Apply PyTorch's rule for ambiguous strides, too (c10: is_channels_last_strides_2d)."""
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(sizes[dim], 1)
    return True
