"""The native `masked_conv2d` operator: how it is called, traced and differentiated.

Its schema is in csrc/library.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gatedconv import _native
from gatedconv.ops import _masked_conv2d_cuda
from gatedconv.ops._masked_conv2d_args import Conv, Geometry, conv_memory_format, executed_macs
from gatedconv.ops._masked_conv2d_compact import compact_backward
from gatedconv.ops._registration import arguments_schema, constant_in_graphs

_NAME = "gatedconv::masked_conv2d"
_library: torch.library.Library | None = None


@constant_in_graphs
def ready() -> bool:
    """Load the native library on the first call."""
    global _library
    if not _native.load("cpu").available:
        return False
    if _library is None:
        _library = torch.library.Library("gatedconv", "FRAGMENT")
        _register(_library)
    return True


def call(conv: Conv, packed: Tensor | None = None) -> Tensor:
    """Call the operator; `ready` must have returned True."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _call(conv, packed)
    # The registered autograd kernel is Python, and would cost more than the rest of the call.
    with torch._C._AutoDispatchBelowAutograd():
        return _call(conv, packed)


def _call(conv: Conv, packed: Tensor | None) -> Tensor:
    tensors, (stride, padding, dilation, groups, _) = conv[:6], conv.geometry
    return torch.ops.gatedconv.masked_conv2d.default(
        *tensors, stride, padding, dilation, groups, conv.relu, packed, **_tf32(conv.input)
    )


def pack(weight: Tensor, out_open: Tensor, in_open: Tensor | None, groups: int) -> Tensor:
    """Pack weights for `call`; `ready` must have returned True."""
    packed: Tensor = torch.ops.gatedconv.masked_conv2d_pack.default(
        weight.detach(), out_open, in_open, groups, **_tf32(weight)
    )
    return packed


def _tf32(tensor: Tensor) -> dict[str, bool]:
    """The argument that only GPUs take."""
    return {"allow_tf32": _masked_conv2d_cuda.allows_tf32()} if tensor.is_cuda and tensor.dtype == torch.float32 else {}


class ConvBackwardArguments(NamedTuple):
    """The arguments of ``gatedconv::masked_conv2d_backward``; ``needs`` is for input, weight, bias and residual."""

    grad: Tensor
    input: Tensor
    weight: Tensor
    out_open: Tensor
    in_open: Tensor | None
    output: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    needs: list[bool]


def _register(library: torch.library.Library) -> None:
    from torch.utils.flop_counter import register_flop_formula  # takes a twentieth of a second

    # The backward is an operator of its own because the number of open channels is not fixed in a graph.
    # Gradients that are not needed come back empty.
    library.define(
        f"masked_conv2d_backward({arguments_schema(ConvBackwardArguments)}) -> (Tensor, Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("masked_conv2d_backward", _backward_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAME}_backward", _backward_fake, lib=library)
    torch.library.register_autograd(f"{_NAME}_backward", _no_second_backward, lib=library)
    torch.library.register_fake(_NAME, _fake, lib=library)
    register_flop_formula(torch.ops.gatedconv.masked_conv2d, get_raw=True)(_flops)
    torch.library.register_fake(f"{_NAME}_pack", _pack_fake, lib=library)
    torch.library.register_autograd(_NAME, _backward, setup_context=_save_for_backward, lib=library)


def _flops(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *rest: Any,
    out_val: Tensor,
    **_: Any,
) -> int:
    """What `torch.utils.flop_counter.FlopCounterMode` counts; of fake tensors, whose masks are unknown, everything."""
    if isinstance(out_open, FakeTensor):
        return 2 * out_val.numel() * weight[0].numel()
    return 2 * executed_macs(weight, out_open, in_open, groups, out_val.shape)


def _fake(*arguments: Any, **_: bool) -> Tensor:
    input, weight, _bias, _out_open, _in_open, _residual, stride, padding, dilation, *_rest = arguments
    high = input.shape[2] + padding[0] + padding[1] - dilation[0] * (weight.shape[2] - 1) - 1
    wide = input.shape[3] + padding[2] + padding[3] - dilation[1] * (weight.shape[3] - 1) - 1
    shape = (input.shape[0], weight.shape[0], high // stride[0] + 1, wide // stride[1] + 1)
    memory_format = conv_memory_format(input, weight)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _pack_fake(weight: Tensor, *_: Any, **__: bool) -> Tensor:
    # Its length depends on how many channels are open.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, out_open, in_open, _, *numbers, relu = inputs[:11]
    ctx.save_for_backward(input, weight, out_open, in_open, output if relu else None)
    ctx.numbers, ctx.inputs = numbers, len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    flat: tuple[Any, ...] = (grad, *ctx.saved_tensors, *ctx.numbers, needs)
    arguments = ConvBackwardArguments(*flat)
    gradients: Sequence[Tensor | None]
    if torch.is_grad_enabled():
        # This gradient is to be differentiated again, so it is made of differentiable steps.
        gradients = _compact_gradients(arguments)
    else:
        made = torch.ops.gatedconv.masked_conv2d_backward(*arguments)
        gradients = tuple(part if need else None for part, need in zip(made, needs, strict=True))
    return *gradients[:3], None, None, gradients[3], *[None] * (ctx.inputs - 6)


def _compact_gradients(a: ConvBackwardArguments) -> Sequence[Tensor | None]:
    n, c, p, q = a.grad.shape
    top, bottom, left, right = a.padding
    strides, dilation = (a.stride[0], a.stride[1]), (a.dilation[0], a.dilation[1])
    geometry = Geometry(strides, (top, bottom, left, right), dilation, a.groups, (n, c, p, q))
    conv = Conv(a.input, a.weight, None, a.out_open, a.in_open, None, geometry, a.output is not None)
    return compact_backward(a.grad, conv, a.output, a.needs)


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    a = ConvBackwardArguments(*arguments)
    format = conv_memory_format(a.input, a.weight)
    results = []
    for part, memory_format in zip(_compact_gradients(a), (format, torch.contiguous_format, None, format), strict=True):
        if part is None:
            results.append(a.grad.new_empty(0))
        elif part is a.grad:  # an operator must not return its argument
            results.append(part.clone(memory_format=format))
        else:
            results.append(part if memory_format is None else part.contiguous(memory_format=memory_format))
    return tuple(results)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    a = ConvBackwardArguments(*arguments)
    format = conv_memory_format(a.input, a.weight)
    shapes = (a.input.shape, a.weight.shape, (a.weight.shape[0],), a.grad.shape)
    formats = (format, torch.contiguous_format, torch.contiguous_format, format)
    return tuple(
        torch.empty(shape, dtype=a.grad.dtype, device=a.grad.device, memory_format=memory_format)
        if need
        else a.grad.new_empty(0)
        for shape, memory_format, need in zip(shapes, formats, a.needs, strict=True)
    )


def _no_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "masked_conv2d: a gradient that was taken without create_graph=True, or in a compiled graph, "
        "cannot be differentiated again"
    )
