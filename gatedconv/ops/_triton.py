"""Operators with Triton kernels: whether the kernels run on a tensor, and how operators are registered.

Kernels run on CUDA, or, under Triton's interpreter, on the CPU for tests. ``GATEDCONV_TRITON`` is ``auto`` (the
default) or ``off`` (the PyTorch references run everywhere).

Eager code calls kernels behind a `torch.autograd.Function`, which costs a fraction of autograd through the dispatcher.
A compiled graph sees them as functional operators ``gatedconv::...``, whose running buffers move in the graph.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
    list[int]: "int[]",
    list[bool]: "bool[]",
}


def kernels_run_on(x: Tensor) -> bool:
    """Whether operators on tensors like x launch Triton kernels: not turned off, and possible on the device of x."""
    return x.device.type in _devices()


def arguments_schema(arguments: type[Any]) -> str:
    """The arguments of an operator's schema from the fields of a NamedTuple, so that they are listed once."""
    types = typing.get_type_hints(arguments)
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in types.items())


def constant_in_graphs(function: _Function) -> _Function:
    """A function whose result a graph that is traced takes as a constant.

    What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


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
