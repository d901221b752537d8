"""The operators of plans on a GPU under torch's own tools; stand-ins for the kernels run on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from gatedconv.ops import _masked_conv2d_cuda, plan
from tests.cuda import plans


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    if (reason := plan.unavailable()) is not None:
        pytest.skip(reason)
    _masked_conv2d_cuda.register_fakes()
    with torch.library._scoped_library("gatedconv", "IMPL") as library:
        library.impl("conv_pack", plans.conv_pack, "CPU")
        library.impl("conv_run", run, "CPU")
        library.impl("resident_run", copy, "CPU")
        yield


def run(*arguments):
    plans.conv_run(*arguments[:-2], arguments[-2:])


def copy(input, stream, output, layout, allow_tf32):
    output.copy_(input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inputs", [5, 16, 35])
def test_packing(inputs, dtype):
    weight = torch.randn(6, inputs, 3, 2).to(dtype)
    for index in (None, torch.arange(inputs, dtype=torch.int32)):
        opcheck(torch.ops.gatedconv.conv_pack.default, (weight, index, False))


@pytest.mark.parametrize("scatters", [False, True])
def test_a_convolution(scatters):
    x = torch.randn(2, 16, 7, 5).to(memory_format=torch.channels_last)
    packed = plans.conv_pack(torch.randn(8, 16, 3, 3), None, False)
    stream = torch.randn(2, 8, 7, 5).to(memory_format=torch.channels_last)
    order = torch.tensor([5, 1, 0, 2, 3, 4, 6, 7, 2], dtype=torch.int32) if scatters else None
    numbers = [[3, 3, 1, 1, 1, 1, 1, 1], 1, False, False, 0, 0]
    arguments = (x, packed, torch.randn(8), None, order, stream if scatters else None, torch.empty_like(stream))
    opcheck(torch.ops.gatedconv.conv_run.default, (*arguments, *numbers))


def test_a_resident_run():
    x = torch.randn(2, 16, 7, 5).half().to(memory_format=torch.channels_last)
    arguments = (x, torch.zeros(4096, dtype=torch.uint8), torch.empty_like(x), [1] * 12, False)
    opcheck(torch.ops.gatedconv.resident_run.default, arguments)
