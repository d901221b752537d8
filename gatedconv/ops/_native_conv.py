"""How the native `masked_conv2d` traces and differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedconv import _native
from gatedconv.ops import cuda_conv
from gatedconv.ops._compact_conv import cut_backward
from gatedconv.ops._conv_args import ConvArguments
from gatedconv.ops._memory_format import conv_memory_format

__all__ = ["call", "pack", "ready"]

_NAME = "gatedconv::masked_conv2d"
_library: torch.library.Library | None = None


def ready() -> bool:
    """Load the native library on the first call; a graph that is traced takes the answer as a constant."""
    global _library
    if not _native.load("cpu").available:
        return False
    if _library is None:
        _library = torch.library.Library("gatedconv", "FRAGMENT")
        _register(_library)
    return True


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None,
    residual: Tensor | None,
    arguments: ConvArguments,
    relu: bool,
    packed: Tensor | None = None,
) -> Tensor:
    """Call the operator; `ready` has said that it is there."""
    a = arguments
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _call(input, weight, bias, out_open, in_open, residual, a, relu, packed)
    # The registered autograd kernel is Python, and would cost more than the rest of the call.
    with torch._C._AutoDispatchBelowAutograd():
        return _call(input, weight, bias, out_open, in_open, residual, a, relu, packed)


def pack(weight: Tensor, out_open: Tensor, in_open: Tensor | None, groups: int) -> Tensor:
    """Pack weights for `call`; `ready` has said that the operator is there."""
    packed: Tensor = torch.ops.gatedconv.masked_conv2d_pack.default(
        weight.detach(), out_open, in_open, groups, **_tf32(weight)
    )
    return packed


def _tf32(tensor: Tensor) -> dict[str, bool]:
    """The argument that only GPUs take."""
    return {"allow_tf32": cuda_conv.allows_tf32()} if tensor.is_cuda and tensor.dtype == torch.float32 else {}


def _call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None,
    residual: Tensor | None,
    a: ConvArguments,
    relu: bool,
    packed: Tensor | None,
) -> Tensor:
    return torch.ops.gatedconv.masked_conv2d.default(
        input,
        weight,
        bias,
        out_open,
        in_open,
        residual,
        a.stride,
        a.padding,
        a.dilation,
        a.groups,
        relu,
        packed,
        **_tf32(input),
    )


def _register(library: torch.library.Library) -> None:
    # The backward is an operator of its own because how many channels are open is no size that a graph knows.
    # Gradients that are not wanted come back empty.
    library.define(
        "masked_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor out_open, Tensor? in_open, "
        "Tensor? output, int[] stride, int[] padding, int[] dilation, int groups, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("masked_conv2d_backward", _backward_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAME}_backward", _backward_fake, lib=library)
    torch.library.register_autograd(f"{_NAME}_backward", _no_second_backward, lib=library)
    torch.library.register_fake(_NAME, _fake, lib=library)
    torch.library.register_fake(f"{_NAME}_pack", _pack_fake, lib=library)
    torch.library.register_autograd(_NAME, _backward, setup_context=_save_for_backward, lib=library)


def _fake(
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
    relu: bool,
    packed: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    high = input.shape[2] + padding[0] + padding[1] - dilation[0] * (weight.shape[2] - 1) - 1
    wide = input.shape[3] + padding[2] + padding[3] - dilation[1] * (weight.shape[3] - 1) - 1
    shape = (input.shape[0], weight.shape[0], high // stride[0] + 1, wide // stride[1] + 1)
    memory_format = conv_memory_format(input, weight)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _pack_fake(
    weight: Tensor, out_open: Tensor, in_open: Tensor | None, groups: int, allow_tf32: bool = False
) -> Tensor:
    # Its length depends on how many channels are open.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, out_open, in_open, _, stride, padding, dilation, groups, relu, *_ = inputs
    ctx.save_for_backward(input, weight, out_open, in_open, output if relu else None)
    ctx.arguments = _arguments(stride, padding, dilation, groups, output)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, out_open, in_open, output = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    a: ConvArguments = ctx.arguments
    gradients: Sequence[Tensor | None]
    if torch.is_grad_enabled():
        # This gradient is to be differentiated again, so it is made of differentiable steps.
        gradients = cut_backward(grad, input, weight, out_open, in_open, output, a, needs)
    else:
        made = torch.ops.gatedconv.masked_conv2d_backward(
            grad, input, weight, out_open, in_open, output, a.stride, a.padding, a.dilation, a.groups, needs
        )
        gradients = tuple(part if need else None for part, need in zip(made, needs, strict=True))
    return *gradients[:3], None, None, gradients[3], *[None] * (ctx.inputs - 6)


def _arguments(
    stride: list[int], padding: list[int], dilation: list[int], groups: int, output: Tensor
) -> ConvArguments:
    top, bottom, left, right = padding
    n, c, p, q = output.shape
    pads = (top, bottom, left, right)
    return ConvArguments((stride[0], stride[1]), pads, (dilation[0], dilation[1]), groups, (n, c, p, q))


def _backward_op(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    out_open: Tensor,
    in_open: Tensor | None,
    output: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    arguments = _arguments(stride, padding, dilation, groups, grad)
    made = cut_backward(grad, input, weight, out_open, in_open, output, arguments, needs)
    format = conv_memory_format(input, weight)
    results = []
    for part, memory_format in zip(made, (format, torch.contiguous_format, None, format), strict=True):
        if part is None:
            results.append(grad.new_empty(0))
        elif part is grad:  # an operator must not return its argument
            results.append(part.clone(memory_format=format))
        else:
            results.append(part if memory_format is None else part.contiguous(memory_format=memory_format))
    return tuple(results)


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    out_open: Tensor,
    in_open: Tensor | None,
    output: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    format = conv_memory_format(input, weight)
    shapes = (input.shape, weight.shape, (weight.shape[0],), grad.shape)
    formats = (format, torch.contiguous_format, torch.contiguous_format, format)
    return tuple(
        torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        if need
        else grad.new_empty(0)
        for shape, memory_format, need in zip(shapes, formats, needs, strict=True)
    )


def _no_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "masked_conv2d: a gradient that was taken without create_graph=True, or in a compiled graph, "
        "cannot be differentiated again"
    )
