"""Operators with Triton kernels: whether the kernels run on a tensor.

Kernels run on CUDA, or, under Triton's interpreter, on the CPU for tests. ``GATEDCONV_TRITON`` is ``auto`` (the
default) or ``off`` (the PyTorch references run everywhere).
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from gatedconv.ops._registration import constant_in_graphs

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernels_run_on(x: Tensor) -> bool:
    """Whether operators on tensors like x launch Triton kernels: not turned off, and possible on the device of x."""
    return x.device.type in _devices()


@constant_in_graphs
def _devices() -> tuple[str, ...]:
    mode = os.environ.get("GATEDCONV_TRITON", "auto")
    if mode not in ("auto", "off"):
        raise ValueError(f"GATEDCONV_TRITON: expected auto or off, got {mode!r}")
    if mode == "off" or not _installed():
        return ()
    # Under the interpreter kernels read CPU memory; a process has one kind of kernel or the other.
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
