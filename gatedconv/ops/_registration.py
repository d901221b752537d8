"""How operators are registered.

Eager code calls kernels behind a `torch.autograd.Function`, which costs a fraction of autograd through the dispatcher.
A compiled graph sees them as functional operators ``gatedconv::...``, whose running buffers move in the graph.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

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


def arguments_schema(arguments: type[Any]) -> str:
    """The arguments of an operator's schema from the fields of a NamedTuple, so that they are listed once."""
    types = typing.get_type_hints(arguments)
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in types.items())


def constant_in_graphs(function: _Function) -> _Function:
    """Have a graph that is traced take the function's result as a constant.

    As torch.compiler.assume_constant_result, without importing the compiler, which takes seconds.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
