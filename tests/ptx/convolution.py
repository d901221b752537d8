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


def find_kernel(form: str, tile: tuple[int, int], architecture: int) -> Kernel:
    """Return the kernel of a format and a tile."""
    found = nvcc.kernels(f"cuda/conv_{form}.cu", architecture)
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
) -> tuple[Tensor, Machine]:
    """Launch a convolution; tensors are of the format's dtype, masks bool (C) or (N, C).

    With `in_place` the output is the residual's memory, whose closed channels stay as they are; `last`: the output is
    channels_last; `kernel`: a changed copy to launch instead of the compiled kernel.

    Returns:
        The output, and the machine with what it noted.
    """
    outputs, _, *taps = weight.shape
    spread = [dilation * (tap - 1) + 1 for tap in taps]
    sizes = [(size + 2 * padding - reach) // stride + 1 for size, reach in zip(x.shape[2:], spread, strict=True)]
    layout = torch.channels_last if last else torch.contiguous_format
    output = torch.full((len(x), outputs, *sizes), float("nan"), dtype=x.dtype).contiguous(memory_format=layout)
    memory = GlobalMemory()
    if in_place:
        output = residual
    geometry = [*taps, stride, stride, padding, padding, dilation, dilation]
    args = arguments(memory, x, bias, residual, output, geometry)
    order = None
    if out_open is not None:
        lists, counts = lists_of(out_open)
        args.masks, args.out_index, args.out_count = len(lists), memory.place(lists), memory.place(counts)
    if in_open is not None:
        lists, counts = lists_of(in_open)
        args.in_masks, args.in_index, args.in_count = len(lists), memory.place(lists), memory.place(counts)
        if in_open.dim() == 1:  # one mask for all: the weights are packed in its order
            order = lists[0, : counts[0]]
    args.act, args.skip_closed = act, in_place
    args.weights = memory.place(pack(form, weight, order))
    machine = launch(form, memory, args, tile, architecture, seed, kernel)
    return as_tensor(memory.read_back(args.output, flat(output)), output), machine


def arguments(
    memory: GlobalMemory, x: Tensor, bias: Tensor | None, residual: Tensor | None, output: Tensor, geometry: list[int]
) -> ConvArgs:
    """Place the tensors and describe them; `geometry` as `gatedconv.ops._masked_conv2d_cuda.conv_run` takes it."""
    args = ConvArgs()
    args.input, args.output = memory.place(flat(x)), memory.place(flat(output))
    if residual is not None:
        args.residual = args.output if residual is output else memory.place(flat(residual))
        args.res_strides[:] = residual.stride()
    if bias is not None:
        args.bias = memory.place(bias.float().numpy())
    args.in_strides[:], args.out_strides[:] = x.stride(), output.stride()
    args.masks = 1
    names = "batch in_channels height width out_channels out_h out_w kernel_h kernel_w stride_h stride_w"
    names += " pad_top pad_left dilation_h dilation_w"
    for name, value in zip(names.split(), [*x.shape, *output.shape[1:], *geometry], strict=True):
        setattr(args, name, value)
    return args


def pack(form: str, weight: Tensor, order: np.ndarray | None) -> np.ndarray:
    """Pack weights (C_out, C_in, KH, KW), of the listed inputs, None for all."""
    number, library = FORMATS[form][0], nvcc.host()
    outputs, channels, *taps = weight.shape
    packed = np.zeros(library.packed(number, channels, taps[0] * taps[1], outputs), flat(weight).dtype)
    library.pack(
        number,
        flat(weight).ctypes.data_as(POINTER),
        (I64 * 4)(*weight.stride()),
        outputs,
        channels,
        *taps,
        None if order is None else np.ascontiguousarray(order).ctypes.data_as(POINTER),
        channels if order is None else len(order),
        packed.ctypes.data_as(POINTER),
    )
    return packed


def launch(
    form: str,
    memory: GlobalMemory,
    args: ConvArgs,
    tile: tuple[int, int],
    architecture: int = 90,
    seed: int = 0,
    kernel: Kernel | None = None,
) -> Machine:
    """Run the kernel of a tile, (0, 0) for the library's choice, and return the machine that ran it."""
    library, made = nvcc.host(), ConvTile()
    assert (library.sizes(0), library.sizes(1)) == (ctypes.sizeof(ConvArgs), ctypes.sizeof(ConvTile))
    assert library.tile(FORMATS[form][0], ctypes.byref(args), ctypes.byref(made), *tile), "no tile fits"
    kernel = kernel or find_kernel(form, (made.mt, made.nt), architecture)
    machine, grid = Machine(memory, seed), (made.pixel_tiles, made.slot_tiles)
    machine.launch(kernel, grid, THREADS, [bytes(args), bytes(made)], made.shared_bytes)
    return machine


def conv_pack(weight: Tensor, in_index: Tensor | None, tf32: bool) -> Tensor:
    """In place of `gatedconv.ops._masked_conv2d_cuda.conv_pack`."""
    return torch.from_numpy(
        pack(form_of(weight, tf32), weight, None).view(np.int16 if weight.itemsize == 2 else np.int32)
    ).view(weight.dtype)


def conv_run(x, packed, bias, in_index, out_index, residual, output, geometry, act, skip_closed, tf32, tile):
    """In place of `gatedconv.ops._masked_conv2d_cuda.conv_run`."""
    memory = GlobalMemory()
    args = arguments(memory, x, bias, residual, output, geometry)
    if in_index is not None:
        args.in_index, args.in_channels = memory.place(in_index.numpy()), len(in_index)
    if out_index is not None:  # all outputs, then how many of them are open
        args.out_index = memory.place(out_index.numpy())
        args.out_count = args.out_index + 4 * output.shape[1]
    args.weights, args.act, args.skip_closed = memory.place(flat(packed)), act, skip_closed
    machine = launch(form_of(x, tf32), memory, args, tile)
    assert not machine.notes, dict(machine.notes)
    return output.copy_(as_tensor(memory.read_back(args.output, flat(output)), output))


def form_of(x: Tensor, tf32: bool) -> str:
    """The format in which tensors of a dtype are multiplied."""
    return {torch.float16: "f16", torch.bfloat16: "bf16"}.get(x.dtype, "tf32" if tf32 else "fp32")
