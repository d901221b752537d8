"""Whether Triton kernels run on a tensor: on CUDA, or, under Triton's interpreter, on the CPU for tests.

``GATEDCONV_TRITON`` is ``auto`` (the default) or ``off`` (the PyTorch references run everywhere).
"""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

__all__ = ["kernels_run_on"]


def kernels_run_on(x: Tensor) -> bool:
    """Whether operators on tensors like x launch Triton kernels: wanted, and possible on the device of x.

    In eager code behind an autograd function, in a compiled graph as functional operators.
    """
    return x.device.type in _devices()


def _devices() -> tuple[str, ...]:
    mode = os.environ.get("GATEDCONV_TRITON", "auto")
    if mode not in ("auto", "off"):
        raise ValueError(f"GATEDCONV_TRITON: expected auto or off, got {mode!r}")
    if mode == "off" or not _installed():
        return ()
    # Under the interpreter kernels read CPU memory; a process has one kind of kernel or the other.
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
vars(_devices)["_dynamo_marked_constant"] = True


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
