"""The convolution that computes only what is open: the public function and its reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from gatedconv.ops import _masked_conv2d_cuda, _masked_conv2d_native
from gatedconv.ops._masked_conv2d_args import Conv, IntPair, check_arguments, conv_memory_format
from gatedconv.ops._masked_conv2d_compact import compact_backward, compact_forward, without_closed_samples
from gatedconv.ops._masked_conv2d_packed import PackedConv


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    packed: PackedConv | None = None,
) -> Tensor:
    """Convolve, computing only the open outputs from only the open inputs.

    ``act(conv2d(input, weight, bias) * out_open + residual)`` with inputs that ``in_open`` closes taken as 0,
    where a closed output is ``act(residual)``, or exactly 0 without one: its bias is not added, and no NaN
    from elsewhere reaches it. Nothing of a closed input is read, NaN or not.

    Differentiable: with ``G' = G * [output > 0]`` where ``relu``, else ``G' = G``, the gradient of
    ``residual`` is ``G'``, those of ``input``, ``weight`` and ``bias`` come from ``G'`` on the open outputs,
    and are exactly 0 on closed inputs and closed rows; the masks have none. Second derivatives are right in
    eager PyTorch; where a compiled or exported graph would need them, an error is raised.

    Args:
        input: (N, C_in, H, W), floating point, any strides.
        weight: (C_out, C_in / groups, KH, KW), dtype and device of ``input``, as all that follows but the
            masks.
        bias: (C_out,), or None.
        out_open: bool (C_out,), or (N, C_out) for a mask for each sample.
        in_open: bool (C_in,), or (N, C_in) for a mask for each sample, or None for all open.
        stride: Step in pixels, one number or (vertical, horizontal).
        padding: Zeros on each side in pixels, one number or (vertical, horizontal), "same" or "valid".
        dilation: Distance of neighboring taps in pixels, one number or (vertical, horizontal).
        groups: Number of groups that the channels are split into.
        residual: (N, C_out, P, Q) to add, or None.
        relu: Whether the output goes through a ReLU.
        packed: Where to keep the packed weights between calls without gradients, or None. It never changes
            the result.

    Returns:
        (N, C_out, P, Q) in the dtype of ``input`` and the memory format that `torch.nn.functional.conv2d`
        gives.

    Raises:
        TypeError: An argument of a wrong type or dtype.
        ValueError: An argument of a wrong rank, size, device or value, or a kernel larger than the padded
            input.
    """
    if packed is not None and not isinstance(packed, PackedConv):
        raise TypeError(f"masked_conv2d: packed must be a PackedConv or None, got {type(packed).__name__}")
    device = input.device.type if isinstance(input, Tensor) else "cpu"
    meta = device == "meta"  # shapes alone: neither an autocast type nor a count of open channels
    if not meta and torch.is_autocast_enabled(device):
        dtype, packed = torch.get_autocast_dtype(device), None
        input, weight, bias, residual = (_cast(tensor, dtype) for tensor in (input, weight, bias, residual))
        with torch.autocast(device, enabled=False):
            numbers = (stride, padding, dilation, groups, residual, relu)
            return _masked_conv2d(check_arguments(input, weight, bias, out_open, in_open, *numbers), packed, meta)
    numbers = (stride, padding, dilation, groups, residual, relu)
    return _masked_conv2d(check_arguments(input, weight, bias, out_open, in_open, *numbers), packed, meta)


def _masked_conv2d(conv: Conv, packed: PackedConv | None, meta: bool) -> Tensor:
    """Compute `masked_conv2d` by the native operator, by compact tensors or, where everything is open, by PyTorch."""
    input, weight = conv.input, conv.weight
    native = _has_kernel(conv) and _masked_conv2d_native.ready()
    if conv.in_open is not None and conv.in_open.dim() == 2 and not (native and _takes_sample_inputs(input)):
        conv = conv._replace(input=_without_closed_inputs(input, conv.in_open), in_open=None)
    if not torch.compiler.is_compiling() and not meta and not (native and _is_recorded()):
        # The native fp64 body is there for traced graphs; PyTorch's convolution is faster.
        # On a GPU looking at a mask would wait for the device.
        dense = input.dtype == torch.float32 and input.device.type == "cpu" and _pytorch_is_faster(conv)
        if dense and conv.residual is None and not conv.relu and not torch.is_grad_enabled():
            return _dense_forward(conv)
        fast = native and input.dtype != torch.float64 and not dense
        # Forward-mode derivatives pass through no_grad; the function below raises that it has none.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return _MaskedConv2d.apply(fast, *conv)
        if not fast:
            return compact_forward(conv)
        if packed is not None:
            kept = packed.tensor(weight, conv.out_open, conv.in_open, conv.geometry.groups)
            return _masked_conv2d_native.call(conv, kept)
        return _masked_conv2d_native.call(conv)
    if native:
        return _masked_conv2d_native.call(conv)
    # The number of open channels is not fixed in a traced graph, so it cannot hold compact tensors.
    return _reference(conv).contiguous(memory_format=conv_memory_format(input, weight))


def masked_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_open: Tensor,
    in_open: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Compute `masked_conv2d` in full, from PyTorch's own functions: what it means, not how fast."""
    numbers = (stride, padding, dilation, groups, residual, relu)
    return _reference(check_arguments(input, weight, bias, out_open, in_open, *numbers))


class _MaskedConv2d(torch.autograd.Function):
    """The eager operator: the native kernel or compact tensors forward, compact tensors backward."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        # A signature of its own would be inspected anew at every call, which takes longer than small layers.
        fast, conv = inputs[0], Conv(*inputs[1:])
        return _masked_conv2d_native.call(conv) if fast else compact_forward(conv)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, input, weight, _, out_open, in_open, _, geometry, relu = inputs
        ctx.save_for_backward(input, weight, out_open, in_open, output if relu else None)
        ctx.geometry = geometry

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, out_open, in_open, output = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (1, 2, 3, 6)]
        conv = Conv(input, weight, None, out_open, in_open, None, ctx.geometry, output is not None)
        to_input, to_weight, to_bias, to_residual = compact_backward(grad, conv, output, needs)
        return None, to_input, to_weight, to_bias, None, None, to_residual, None, None


def _reference(conv: Conv) -> Tensor:
    input, weight, bias, out_open, in_open, residual, geometry, relu = conv
    groups, channels = geometry.groups, weight.shape[0]
    if in_open is not None and in_open.dim() == 2:
        input, in_open = _without_closed_inputs(input, in_open), None
    if in_open is not None:
        input = torch.where(in_open[:, None, None], input, 0)
        taps = in_open.view(groups, 1, -1).expand(groups, channels // groups, -1).reshape(channels, -1)
        weight = torch.where(taps[:, :, None, None], weight, 0)
    if out_open.dim() == 1:
        # A NaN in a closed row would come back through the gradient of the input.
        weight = torch.where(out_open[:, None, None, None], weight, 0)
    else:
        input = without_closed_samples(input, out_open, groups)
    top, bottom, left, right = geometry.padding
    padded = F.pad(input, (left, right, top, bottom))
    out = F.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, groups)
    out = torch.where(out_open.view(-1, channels, 1, 1), out, 0)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if relu else out


def _without_closed_inputs(input: Tensor, in_open: Tensor) -> Tensor:
    """Zero what the mask (N, C_in) of each sample closes; its gradient is 0 there."""
    return torch.where(in_open[:, :, None, None], input, 0)


def _is_recorded() -> bool:
    """Whether torch.jit.trace or, without gradients, a dispatch mode records: one operator, whatever the masks are."""
    if torch._C._is_tracing():
        return True
    plain = not torch.is_grad_enabled() and forward_ad._current_level < 0
    return plain and torch._C._len_torch_dispatch_stack() > 0


def _takes_sample_inputs(input: Tensor) -> bool:
    """Whether a kernel takes a mask of inputs for each sample: on a GPU, where nothing is differentiated or traced."""
    return input.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _has_kernel(conv: Conv) -> bool:
    input, geometry = conv.input, conv.geometry
    if input.device.type == "cpu":
        return input.dtype in (torch.float32, torch.float64)
    if input.device.type != "cuda" or _masked_conv2d_cuda.kernels_mode() != "on":
        return False
    return _masked_conv2d_cuda.supports(input, conv.weight.shape[2:], geometry.dilation, geometry.groups)


# Where everything is open PyTorch's convolution is as fast from this many multiply-adds on; below, it pays
# more for the call than for the work. On an AMD EPYC with half of it layers take up to 1.9 times as long; with
# twice, 0.47 to 1.09 of the time with AVX-512, and 0.88 to 1.15 with AVX2 (benchmarks/results/constants-epyc-2c.json).
_DENSE_MACS = 10_000_000

# But for 3x3 filters of few weights, for which the operator has Winograd's algorithm, and few input channels. The
# least inputs and most weights equal those of can_use_maps in csrc/cpu/masked_maps.cpp.
_NARROW = 4
_LEAST_INPUTS = 8
_MOST_WEIGHTS = 64 * 128


def _pytorch_is_faster(conv: Conv) -> bool:
    """Whether PyTorch's convolution is faster: everything is open and the layer is large."""
    geometry = conv.geometry
    n, _, p, q = geometry.output_shape
    channels, inputs, *kernel = conv.weight.shape
    if kernel == [3, 3] and geometry.groups == 1 and geometry.dilation == (1, 1):
        if (inputs <= _NARROW and channels <= 16) or _LEAST_INPUTS <= inputs <= _MOST_WEIGHTS // channels:
            return False
    if n * p * q * conv.weight.numel() < _DENSE_MACS or geometry.padding[::2] != geometry.padding[1::2]:
        return False
    return _all_open(conv.out_open) and (conv.in_open is None or _all_open(conv.in_open))


def _all_open(mask: Tensor) -> bool:
    # For a few hundred channels a list is a tenth of the time of a reduction.
    return False not in mask.tolist() if mask.numel() <= 512 and mask.dim() == 1 else bool(mask.all())


def _dense_forward(conv: Conv) -> Tensor:
    stride, (top, _, left, _), dilation, groups, _ = conv.geometry
    return F.conv2d(conv.input, conv.weight, conv.bias, stride, (top, left), dilation, groups)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    # fp64 stays fp64 under autocast, as in PyTorch's own convolution.
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor
