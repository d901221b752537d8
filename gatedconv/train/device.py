"""The device of a run, its precision, and how networks and batches are placed on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gatedconv.environment import cpu_info
from gatedconv.train.options import RuntimeOptions


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one.

    Raises:
        ValueError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one that this machine has ({torch.cuda.device_count()} GPUs), got {name!r}")
    return device


def mixed_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype that convolutions are computed in on a device; None for the parameters' own.

    "auto" is bf16 where the device computes in it.
    """
    if amp == "auto":
        return torch.bfloat16 if computes_in_bf16(device) else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def precision_note(amp: str, device: torch.device) -> str:
    """Why `amp` is a bad choice on a device; "" where it is not."""
    if amp != "bf16" or device.type != "cpu" or computes_in_bf16(device):
        return ""
    return (
        "amp: this CPU has no bf16 instructions (avx512_bf16, amx_bf16) and converts every value to fp32 and back: "
        "slower than fp32, and less exact; use auto or off"
    )


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 instructions: GPUs from compute capability 8.0, CPUs with avx512_bf16 or amx_bf16.

    On such a CPU (AMX, one thread) a step of ResNet-20 at batch 128 and 32x32 takes 2.8 s in bf16 and 4.4 s in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool({"avx512_bf16", "amx_bf16"} & set((cpu_info("flags") or "").split()))


@contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """Context in which cuDNN times its algorithms and uses the fastest for each shape, unless the user wants the same.

    For training steps, whose shapes stay.
    """
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        yield
        return
    before = cudnn.benchmark
    _set_benchmark(True)
    try:
        yield
    finally:
        _set_benchmark(before)


def _set_benchmark(on: bool) -> None:
    # The attribute is read-only after `torch.backends.disable_global_flags`, which is about lasting changes; and
    # cudnn.set_flags reads all flags, which raises where the precision is set for one kind of operator alone
    # (pytorch/pytorch#179445).
    torch._C._set_cudnn_benchmark(on)


def placement(options: RuntimeOptions) -> dict[str, Any]:
    """Device and memory format of the batches, as arguments of `TrainBatches` and `EvalBatches`."""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return {"device": resolve_device(options.device), "memory_format": layout}


def place(model: nn.Module, options: RuntimeOptions) -> nn.Module:
    """Move a network to the device and memory format of the batches; returns it."""
    where = placement(options)
    moved = model.to(where["device"])
    moved = moved.to(memory_format=where["memory_format"])  # type: ignore[call-overload]
    return moved
