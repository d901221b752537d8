"""For a dry walk of the GPU benchmarks: operators run their kernels on a simulated GPU, where Triton is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Run Triton kernels on CPU tensors as PTX; without Triton the PyTorch references run.

    Raises:
        AssertionError: At the end, where the interpreter noted a race or a read of memory that nobody wrote.
    """
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.ptx.triton_device import simulated

    with simulated(90) as device:
        yield
    assert not device.notes, dict(device.notes)
