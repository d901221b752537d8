"""Launches nvcc's PTX of the tiled convolution on a simulated GPU."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from tests.ptx import nvcc
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import Kernel

# format: (number in host.cpp, mangled name, dtype, oldest architecture)
FORMATS = {
    "f16": (0, "4Half", torch.float16, 75),
    "bf16": (1, "8BFloat16", torch.bfloat16, 80),
    "tf32": (2, "13TensorFloat32", torch.float32, 80),
    "fp32": (3, "7Float32", torch.float32, 75),
}
TILES = [(mt, nt) for mt in (1, 2) for nt in (1, 2, 4, 8)]
THREADS = 128
I32, I64, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class ConvArgs(ctypes.Structure):
    """As in csrc/shared/conv_tile.h."""

    _fields_ = [
        *((name, POINTER) for name in ("input", "weights", "bias", "residual", "output")),
        *((name, POINTER) for name in ("in_index", "in_count", "out_index", "out_count")),
        *((name, I64 * 4) for name in ("in_strides", "res_strides", "out_strides")),
        *((name, I32) for name in ("batch", "in_channels", "height", "width", "out_channels", "out_h", "out_w")),
        *((name, I32) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left")),
        *((name, I32) for name in ("dilation_h", "dilation_w", "masks", "in_masks", "act")),
        *((name, ctypes.c_bool) for name in ("skip_closed", "in_vector", "out_vector", "in_planar", "out_planar")),
    ]


class ConvTile(ctypes.Structure):
    """As in csrc/shared/conv_tile.h."""

    _fields_ = [
        *((name, I32) for name in ("mt", "nt", "samples", "rows", "cols", "patch_h", "patch_w")),
        *((name, I32) for name in ("step_h", "step_w", "tap_h", "tap_w", "from_h", "from_w", "chunks")),
        *((name, I32) for name in ("group_taps", "pitch", "patch_bytes", "weight_bytes", "shared_bytes")),
        *((name, I32) for name in ("row_tiles", "col_tiles")),
        ("pixel_tiles", I64),
        ("slot_tiles", I32),
    ]


def find_kernel(form: str, tile: tuple[int, int], architecture: int, edit: nvcc.Edit | None = None) -> Kernel:
    """Return the kernel of a format and a tile."""
    found = nvcc.kernels(f"cuda/conv_{form}.cu", architecture, edit)
    name = f"conv_kernelINS_{FORMATS[form][1]}ELi{tile[0]}ELi{tile[1]}E"
    return next(kernel for full, kernel in found.items() if name in full)


def flat(tensor: Tensor) -> np.ndarray:
    """The tensor's memory, element by element, as unsigned numbers."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    kind = torch.int16 if tensor.element_size() == 2 else torch.int32
    return torch.as_strided(tensor, (count,), (1,), 0).view(kind).numpy()


def as_tensor(data: np.ndarray, like: Tensor) -> Tensor:
    """Undo `flat`."""
    return torch.from_numpy(data).view(like.dtype).as_strided(like.shape, like.stride())


def lists_of(mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For every mask its open channels, then the closed ones; and how many are open."""
    rows = mask.view(-1, mask.shape[-1]).numpy()
    order = np.stack([np.concatenate([np.nonzero(row)[0], np.nonzero(~row)[0]]) for row in rows])
    return order.astype(np.int32), rows.sum(1).astype(np.int32)


def run(
    form: str,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_open: Tensor | None = None,
    in_open: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    act: int = 0,
    tile: tuple[int, int] = (1, 2),
    in_place: bool = False,
    last: bool = True,
    architecture: int = 90,
    seed: int = 0,
    kernel: Kernel | None = None,
    edit: nvcc.Edit | None = None,
) -> tuple[Tensor, Machine]:
    """Launch a convolution; tensors are of the format's dtype, masks bool (C) or (N, C).

    With `in_place` the output is the residual's memory, whose closed channels stay as they are; `last`: the output is
    channels_last; `kernel`: a changed copy to launch instead of the compiled kernel; `edit`: a change of the sources.

    Returns:
        The output, and the machine with what it noted.
    """
    number, _, dtype, _ = FORMATS[form]
    library = nvcc.host()
    assert (library.sizes(0), library.sizes(1)) == (ctypes.sizeof(ConvArgs), ctypes.sizeof(ConvTile))
    batch, channels, height, width = x.shape
    outputs, _, *taps = weight.shape
    sizes = [
        (size + 2 * padding - dilation * (tap - 1) - 1) // stride + 1
        for size, tap in zip((height, width), taps, strict=True)
    ]
    layout = torch.channels_last if last else torch.contiguous_format
    output = torch.full((batch, outputs, *sizes), float("nan"), dtype=dtype).contiguous(memory_format=layout)
    memory, args, made = GlobalMemory(), ConvArgs(), ConvTile()
    args.input = memory.place(flat(x))
    if in_place:
        output = residual
    args.output = memory.place(flat(output))
    if residual is not None:
        args.residual = args.output if in_place else memory.place(flat(residual))
        args.res_strides[:] = residual.stride()
    if bias is not None:
        args.bias = memory.place(bias.float().numpy())
    args.in_strides[:], args.out_strides[:] = x.stride(), output.stride()
    args.masks, order, count = 1, None, channels
    if out_open is not None:
        lists, counts = lists_of(out_open)
        args.masks, args.out_index, args.out_count = len(lists), memory.place(lists), memory.place(counts)
    if in_open is not None:
        lists, counts = lists_of(in_open)
        args.in_masks, args.in_index, args.in_count = len(lists), memory.place(lists), memory.place(counts)
        if in_open.dim() == 1:  # one mask for all: the weights are packed in its order
            order, count = np.ascontiguousarray(lists[0]), int(counts[0])
    for name, values in (
        ("batch in_channels height width", x.shape),
        ("out_channels out_h out_w", (outputs, *sizes)),
        ("kernel_h kernel_w", taps),
        ("stride_h stride_w", (stride, stride)),
        ("pad_top pad_left", (padding, padding)),
        ("dilation_h dilation_w", (dilation, dilation)),
    ):
        for field, value in zip(name.split(), values, strict=True):
            setattr(args, field, value)
    args.act, args.skip_closed = act, in_place
    packed = np.zeros(library.packed(number, channels, taps[0] * taps[1], outputs), flat(x).dtype)
    library.pack(
        number,
        flat(weight).ctypes.data_as(POINTER),
        (I64 * 4)(*weight.stride()),
        outputs,
        channels,
        *taps,
        None if order is None else order.ctypes.data_as(POINTER),
        count,
        packed.ctypes.data_as(POINTER),
    )
    args.weights = memory.place(packed)
    assert library.tile(number, ctypes.byref(args), ctypes.byref(made), *tile), "no tile fits"
    machine = Machine(memory, seed)
    machine.launch(
        kernel or find_kernel(form, tile, architecture, edit),
        (made.pixel_tiles, made.slot_tiles),
        THREADS,
        [bytes(args), bytes(made)],
        made.shared_bytes,
    )
    return as_tensor(memory.read_back(args.output, flat(output)), output), machine
