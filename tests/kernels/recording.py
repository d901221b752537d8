"""Launchers run on CPU tensors; their launches are recorded instead of being run.

Outputs are what ``torch.empty`` found in memory; shapes, counts and arguments are those of a real launch.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gatedconv.ops import _triton

KERNELS = Path(__file__).parents[2] / "kernels"

# What launches nothing: memory and views of it.
MEMORY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
VIEWS = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "select", "slice", "alias", "detach", "as_strided"}
VIEWS |= {"permute", "transpose", "t", "split", "split_with_sizes", "unbind", "_reshape_alias"}


class Launch(NamedTuple):
    """A launch of a kernel: its arguments by name, constants included, and compiler options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


class Recording:
    """What one stretch of code did.

    Attributes:
        launches: of our kernels.
        operators: names of PyTorch's operators that would have launched something.
        allocated: (name, bytes) of the memory that was allocated.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.operators: list[str] = []
        self.allocated: list[tuple[str, int]] = []

    @property
    def count(self) -> int:
        return len(self.launches) + len(self.operators)

    def __str__(self) -> str:
        return f"kernels {[launch.name for launch in self.launches]}, operators {self.operators}"


@contextlib.contextmanager
def recorded():
    """Record launches on any device as if it were a GPU; the process must not interpret its kernels."""
    import triton

    assert os.environ.get("TRITON_INTERPRET") != "1"
    recording = Recording()

    def run(kernel, *values, grid, warmup, **options):
        constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
        named = dict(zip(kernel.arg_names, values, strict=False)) | constants
        assert named.keys() == set(kernel.arg_names), set(kernel.arg_names) ^ named.keys()
        recording.launches.append(Launch(kernel, grid, named, options))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = function.name().removeprefix("aten::").split(".")[0]
            if name not in MEMORY | VIEWS:
                recording.operators.append(name)
            elif name.endswith(("empty", "empty_like", "empty_strided")) and result.device.type != "meta":
                recording.allocated.append((name, result.numel() * result.element_size()))
            return result

    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", run),
        mock.patch.object(_triton, "_devices", lambda: ("cpu",)),
        Operators(),
    ):
        yield recording


def gate_step(gate, x, parts=("gate", "rate")):
    """A function: forward and backward of a gate, from gradients that are there already."""
    leaves = [x, *(p for p in gate.parameters())]
    incoming = {"gate": torch.ones(x.shape[0], gate.num_gates, dtype=x.dtype), "rate": torch.ones(gate.num_gates)}

    def step():
        decision = gate(x)
        outputs = {"gate": decision, "rate": gate.open_rate}
        return torch.autograd.grad([outputs[p] for p in parts], leaves, [incoming[p] for p in parts])

    return step


def kernel_names():
    """Names of the kernels: what launchers launch as ``name[(grid)](...)``."""
    sources = [path.read_text() for path in KERNELS.glob("*.py")]
    return {name for source in sources for name in re.findall(r"^ +([a-z_]+)\[\(", source, re.MULTILINE)}
