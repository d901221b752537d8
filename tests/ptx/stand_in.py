"""For a dry walk of the GPU benchmarks: what a GPU would run runs on a simulated one, as far as compilers are there."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from unittest import mock

from gatedconv import _build
from gatedconv.engine.cuda import resident
from gatedconv.ops import _masked_conv2d_cuda
from tests.ptx import convolution
from tests.ptx.resident import Driver

H100 = resident.Limits(232448, (1, 2, 4, 8))


@contextlib.contextmanager
def installed() -> Iterator[bool]:
    """Run the kernels on CPU tensors as PTX: Triton's where Triton is installed, those of csrc/ where nvcc is.

    Yields whether the latter do; without their compiler the PyTorch references run.

    Raises:
        AssertionError: The interpreter noted a race or a read of memory that nobody wrote.
    """
    driver = Driver()
    with contextlib.ExitStack() as stack:
        compiles = has_nvcc()
        if compiles:
            for owner, name, replacement in (
                (_masked_conv2d_cuda, "conv_pack", convolution.conv_pack),
                (_masked_conv2d_cuda, "conv_run", convolution.conv_run),
                (_masked_conv2d_cuda, "supports", lambda input, kernel, dilation, groups: groups == 1),
                (resident, "limits", lambda device, dtype: H100),
                (resident, "resident_run", driver.run),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
        device = None
        if importlib.util.find_spec("triton") is not None:
            from tests.ptx.triton_device import simulated

            device = stack.enter_context(simulated(90))
        yield compiles
        notes = [*driver.machines, *([] if device is None else [device])]
        assert not any(one.notes for one in notes), [dict(one.notes) for one in notes if one.notes]


def has_nvcc() -> bool:
    """Whether kernels of csrc/ can be compiled here."""
    try:
        _build.find_toolkit()
    except _build.BuildError:
        return False
    return True
