"""The convolution kernels of the CUDA library: whether they may run here, and the calls that a plan makes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gatedconv import _native
from gatedconv.ops._registration import constant_in_graphs

# (16-row fragments of a warp, 8-column fragments of a block) that the library has kernels for.
TILES = tuple((rows, columns) for rows in (1, 2) for columns in (1, 2, 4, 8))
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MODES = ("off", "on", "auto", "experimental")


_mode: str | None = None  # what `cuda_kernels` chose; None: the environment variable decides


@constant_in_graphs
def kernels_mode() -> str:
    """Return which convolution kernels run on CUDA: what `cuda_kernels` chose, else GATEDCONV_CUDA_KERNELS, else "off".

    Raises:
        ValueError: The variable has another value than the modes of `cuda_kernels`.
    """
    if _mode is not None:
        return _mode
    return _checked("GATEDCONV_CUDA_KERNELS", os.environ.get("GATEDCONV_CUDA_KERNELS", "off"))


@contextlib.contextmanager
def cuda_kernels(mode: str) -> Iterator[None]:
    """Choose, inside a ``with`` block, which convolution kernels run on CUDA; on CPUs nothing changes.

    Results of the kernels differ by rounding. As the flags of `torch.backends`, the choice holds for all threads of the
    process, and for what is called inside the block, not for what was built there: a compiled graph keeps the mode that
    it was traced with, an `Engine` the mode of its construction. Outside of any block the environment variable
    GATEDCONV_CUDA_KERNELS decides, read at every call.

    Args:
        mode: "off", the default, since cuDNN was faster on most layers of an H200: PyTorch convolves compact tensors.
            "on": our kernels run wherever there is one, in `masked_conv2d`, in skipped blocks and in an `Engine`.
            "auto": an `Engine` measures both for every layer and takes the faster one that is right; single operators
            stay with PyTorch.
            "experimental": as "auto", and runs of layers that fit into shared memory are measured as one launch of the
            image-resident driver, too.

    Raises:
        ValueError: Another mode.
    """
    global _mode
    before, _mode = _mode, _checked("cuda_kernels", mode)
    try:
        yield
    finally:
        _mode = before


def _checked(owner: str, mode: str) -> str:
    if mode not in _MODES:
        raise ValueError(f"{owner}: expected {', '.join(_MODES[:-1])} or {_MODES[-1]}, got {mode!r}")
    return mode


@constant_in_graphs
def allows_tf32() -> bool:
    """Whether PyTorch's own settings let convolutions of float32 multiply in tf32."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def supports(input: Tensor, kernel: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether there is a kernel for this convolution and its library can be loaded."""
    if input.device.type != "cuda" or input.dtype not in _DTYPES or groups != 1:
        return False
    # One output pixel must find everything that it reads, 48 bytes a pixel and twice, in addition to the weights.
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if reach[0] * reach[1] > 400:
        return False
    return _library_serves(input.device.index or 0, input.dtype == torch.bfloat16)


@constant_in_graphs
def _library_serves(device: int, bfloat16: bool) -> bool:
    if bfloat16 and torch.cuda.get_device_capability(device)[0] < 8:
        return False
    if not _native.load("cuda").available:
        return False
    register_fakes()
    return True


_library: torch.library.Library | None = None


def register_fakes() -> None:
    """Register the fakes of these operators; the library that declares them must be loaded."""
    global _library
    if _library is None:
        _library = torch.library.Library("gatedconv", "FRAGMENT")
        torch.library.register_fake("gatedconv::conv_pack", _pack_fake, lib=_library)
        for name in ("conv_run", "resident_run"):  # they write to an argument
            torch.library.register_fake(f"gatedconv::{name}", _no_result, lib=_library)


def _pack_fake(weight: Tensor, in_index: Tensor | None, allow_tf32: bool) -> Tensor:
    step = 32 // weight.dtype.itemsize  # inputs of a step of 32 bytes, the last one padded: csrc/shared/conv_tile.h
    outputs, inputs, height, width = weight.shape
    return weight.new_empty(-(-inputs // step) * step * height * width * outputs)


def _no_result(*_: object) -> None:
    """The fake of an operator that writes to an argument and returns nothing."""


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
