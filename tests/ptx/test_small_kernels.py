"""nvcc's PTX of the kernels around the tiled convolution, executed: index lists, packing, the direct convolution."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.cuda.plans import conv_pack
from tests.ptx import nvcc
from tests.ptx.convolution import FORMATS, I32, I64, POINTER, as_tensor, flat, lists_of
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory

CUDA_FORMATS = {"f16": "Half", "bf16": "BFloat16", "tf32": "TensorFloat32", "fp32": "Float32"}
BITS = {"f16": 0, "bf16": 0, "tf32": 13, "fp32": 0}  # of the mantissa that packing rounds away


class ConvShape(ctypes.Structure):
    """As in csrc/shared/masked_conv2d.h."""

    _fields_ = [
        *((name, I64) for name in ("batch", "in_channels", "height", "width")),
        *((name, I64) for name in ("out_channels", "kernel_h", "kernel_w", "out_h", "out_w")),
        *(
            (name, I64)
            for name in ("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups")
        ),
    ]


class ConvTensors(ctypes.Structure):
    """As in csrc/shared/masked_conv2d.h."""

    _fields_ = [
        *((name, POINTER) for name in ("input", "weight", "bias", "residual", "output")),
        *((name, POINTER) for name in ("out_open", "in_index", "in_offset")),
        *((name, I64 * 4) for name in ("input_strides", "weight_strides", "residual_strides", "output_strides")),
        ("mask_stride", I64),
        ("relu", ctypes.c_bool),
    ]


def launch(memory, source, name, grid, threads, *arguments):
    """Run the kernel whose mangled name contains `name`; numbers without a type of their own are addresses."""
    kernel = next(one for full, one in nvcc.kernels(source, 90).items() if name in full)
    machine = Machine(memory)
    given = [bytes(I64(one) if isinstance(one, int) else one) for one in arguments]
    machine.launch(kernel, (grid,), threads, given)
    assert not machine.notes, dict(machine.notes)


@pytest.mark.parametrize("channels", [1, 32, 300])
def test_list_open(channels):
    mask = torch.rand(3, channels) < 0.5
    mask[0] = True
    memory = GlobalMemory()
    at = memory.place(mask.numpy())
    index, count = np.full((3, channels), -1, np.int32), np.full(3, -1, np.int32)
    to, into = memory.place(index), memory.place(count)
    launch(memory, "cuda/conv_lists.cu", "list_open_kernel", 3, 32, at, I32(channels), to, into)
    expected = lists_of(mask)
    assert np.array_equal(memory.read_back(to, index), expected[0])
    assert np.array_equal(memory.read_back(into, count), expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("threads", [32, 128])
def test_pack(threads, form, gathers):
    """Fewer threads than numbers: each packs several."""
    dtype = FORMATS[form][2]
    weight = torch.randn(5, 19, 3, 2).to(dtype).contiguous(memory_format=torch.channels_last)
    index = torch.randperm(19)[:7].sort().values if gathers else torch.arange(19)
    chosen = torch.zeros_like(weight)
    chosen[:, : len(index)] = weight[:, index]
    if bits := BITS[form]:  # to nearest, ties away from zero
        chosen = ((chosen.view(torch.int32) + (1 << (bits - 1))) & ~((1 << bits) - 1)).view(torch.float32)
    expected = conv_pack(chosen, None, form == "tf32")
    memory, packed = GlobalMemory(), torch.full_like(expected, float("nan"))
    to = memory.place(flat(packed))
    lists = [memory.place(index.int().numpy()), memory.place(np.array([len(index)], np.int32))] if gathers else [0, 0]
    sizes = [I32(size) for size in (5, 19, 3, 2)]
    numbers = ((I64 * 4)(*weight.stride()), *sizes, *lists, to, packed.numel())
    name = f"pack_kernelINS_{len(CUDA_FORMATS[form])}{CUDA_FORMATS[form]}"
    arguments = (memory.place(flat(weight)), *numbers)
    launch(memory, f"cuda/conv_{form}.cu", name, 3, threads, *arguments)
    assert torch.equal(as_tensor(memory.read_back(to, flat(packed)), packed), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "direct_kernelIf"), (torch.float64, "direct_kernelId")])
@pytest.mark.parametrize("plain", [False, True])
def test_direct(dtype, name, plain):
    """Groups, dilation, strides, masks of samples and inputs, bias, residual and ReLU; or none of them."""
    groups, stride, padding, dilation = (1, 1, 0, 1) if plain else (2, 2, 3, 2)
    x, weight = torch.randn(2, 12, 6, 7, dtype=dtype), torch.randn(4, 12 // groups, 3, 5, dtype=dtype)
    bias, out_open = torch.randn(4, dtype=dtype), torch.rand(2, 4) < 0.6
    in_open = torch.rand(12) < 0.6
    if plain:
        out_open = torch.ones(1, 4, dtype=torch.bool)
        in_open[:] = True
    exact = F.conv2d(torch.where(in_open[:, None, None], x, 0), weight, bias, stride, padding, dilation, groups)
    residual = torch.randn_like(exact)
    if plain:
        exact = exact - bias[:, None, None]
    else:
        exact = (torch.where(out_open[..., None, None], exact, 0) + residual).relu()
    memory, output = GlobalMemory(), torch.full_like(exact, float("nan"))
    lists = np.full(12 + groups + 1, -1, np.int32)
    listed = memory.place(lists)
    offsets = listed + 4 * 12
    given = 0 if plain else memory.place(in_open.numpy())
    source = "cuda/conv_direct.cu"
    launch(memory, source, "list_inputs_kernel", 1, 1, given, 12, groups, listed, offsets)
    shape = ConvShape(*x.shape, 4, 3, 5, *exact.shape[2:], stride, stride, padding, padding, dilation, dilation, groups)
    place = lambda tensor: memory.place(tensor.numpy())  # noqa: E731
    made = ConvTensors(
        place(x),
        place(weight),
        0 if plain else place(bias),
        0 if plain else place(residual),
        place(output),
        place(out_open),
        listed,
        offsets,
        *((I64 * 4)(*tensor.stride()) for tensor in (x, weight, residual, output)),
        0 if plain else 4,
        not plain,
    )
    launch(memory, source, name, 1, 64, shape, made, output.numel())
    result = torch.from_numpy(memory.read_back(made.output, output.numpy()))
    tolerances.assert_close(result, exact, terms=12 * weight[0, 0].numel())
