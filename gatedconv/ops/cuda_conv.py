"""The convolution kernels of the CUDA library: whether they may run here, and the calls that a plan makes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gatedconv import _native

__all__ = ["TILES", "allows_tf32", "conv_pack", "conv_run", "kernels_mode", "takes"]

# (16-row fragments of a warp, 8-column fragments of a block) that the library has kernels for.
TILES = tuple((rows, columns) for rows in (1, 2) for columns in (1, 2, 4, 8))
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MODES = ("off", "on", "auto", "experimental")


def kernels_mode() -> str:
    """Return what GATEDCONV_CUDA_KERNELS says of our own convolution kernels on CUDA.

    "off" (the default: no speed has been measured on a GPU yet): PyTorch convolves compact tensors. "on": ours run
    wherever there is one. "auto": an `Engine` measures both for every layer and takes the faster one that is right;
    single operators stay with PyTorch. "experimental": as "auto", and runs of layers that fit into shared memory are
    measured as one launch of the image-resident driver, too.

    Raises:
        ValueError: The variable has another value.
    """
    mode = os.environ.get("GATEDCONV_CUDA_KERNELS", "off")
    if mode not in _MODES:
        raise ValueError(f"GATEDCONV_CUDA_KERNELS: expected off, on, auto or experimental, got {mode!r}")
    return mode


def allows_tf32() -> bool:
    """Whether PyTorch's own settings let convolutions of float32 multiply in tf32."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def takes(input: Tensor, kernel: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether there is a kernel for this convolution and its library can be loaded."""
    if input.device.type != "cuda" or input.dtype not in _DTYPES or groups != 1:
        return False
    # One output pixel must find everything that it reads, 48 bytes a pixel and twice, beside the weights.
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if reach[0] * reach[1] > 400:
        return False
    return _library_serves(input.device.index or 0, input.dtype == torch.bfloat16)


def _library_serves(device: int, bfloat16: bool) -> bool:
    if bfloat16 and torch.cuda.get_device_capability(device)[0] < 8:
        return False
    return _native.load("cuda").available


# A graph that is traced takes the answers as constants; see `_native_conv.ready`.
for _answer in (kernels_mode, allows_tf32, _library_serves):
    vars(_answer)["_dynamo_marked_constant"] = True


def conv_pack(weight: Tensor, in_index: Tensor | None, tf32: bool) -> Tensor:
    """Pack weight (C_out, inputs, KH, KW) for `conv_run` in the order in which fragments are read."""
    packed: Tensor = torch.ops.gatedconv.conv_pack.default(weight, in_index, tf32)
    return packed


def conv_run(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    geometry: Sequence[int],
    act: int,
    skip_closed: bool,
    tf32: bool,
    tile: tuple[int, int],
) -> Tensor:
    """Write act(convolution + bias + residual) to `output` and return it; see csrc/library.cpp."""
    torch.ops.gatedconv.conv_run.default(
        input, packed, bias, in_index, out_index, residual, output, geometry, act, skip_closed, tf32, *tile
    )
    return output
