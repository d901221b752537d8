"""A Triton driver for a simulated GPU: what `kernel[grid](...)` launches on CPU tensors runs as PTX.

Triton's own launch path is used as it is: it specializes the arguments, compiles for the driver's target, and calls the
driver's launcher, which reads the PTX from Triton's cache.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gatedconv.ops import _triton
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import Kernel, parse

SCALARS = {"fp32": "<f", "fp64": "<d", "i1": "<?", "u1": "<?", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q"}
_kernels: dict[str, Kernel] = {}


class Device:
    """The driver, and what ran.

    Attributes:
        notes: Problems found, with kernel and instruction -> how often.
        launches: Name of a kernel -> how often it ran.
        variants: Name and hash of every compiled variant that ran.
        edit: Changes a kernel before it runs.
    """

    def __init__(self, capability: int = 90, seed: int = 0) -> None:
        self.capability, self.seed = capability, seed
        self.notes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.variants: set[tuple[str, str]] = set()
        self.edit: Any = None
        self.launcher_cls = lambda source, metadata: _Launcher(self, source, metadata)
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (None, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448 if capability >= 90 else 65536},
        )

    def get_current_device(self) -> int:
        """A number for each capability: Triton keeps what it compiled by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """There is one."""
        return 0

    def get_current_target(self) -> Any:
        """What kernels are compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def run(self, name: str, key: str, kernel: Kernel, grid: Any, metadata: Any, values: list[Any]) -> None:
        """Launch on copies of the tensors' memory, then copy it back."""
        memory, homes, arguments = GlobalMemory(), {}, []
        for value, kind in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in homes:
                    raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                    homes[storage.data_ptr()] = (memory.place(raw), raw)
                offset = value.data_ptr() - storage.data_ptr()
                arguments.append(struct.pack("<Q", homes[storage.data_ptr()][0] + offset))
            else:
                arguments.append(struct.pack(SCALARS.get(kind, "<i"), value))
        self.seed += 1
        machine = Machine(memory, self.seed, resident=6, slice=40)
        machine.launch(kernel, grid, 32 * metadata.num_warps, arguments, metadata.shared)
        for address, raw in homes.values():
            raw[...] = memory.read_back(address, raw)
        self.launches[name] += 1
        self.variants.add((name, key))
        self.notes.update({f"{name}: {note}": count for note, count in machine.notes.items()})


class _Launcher:
    """What Triton calls for every launch of one compiled variant."""

    def __init__(self, device: Device, source: Any, metadata: Any) -> None:
        from triton.runtime.cache import get_cache_manager

        self.device, self.metadata, self.signature = device, metadata, list(source.signature.values())
        self.name, self.key = source.fn.__name__, metadata.hash
        if self.key not in _kernels:
            text = Path(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")).read_text()
            (_kernels[self.key],) = parse(text).values()

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        bound = rest[-len(self.signature) :]  # behind stream, function, metadata and hooks
        values = [pair for value, kind in zip(bound, self.signature, strict=True) for pair in _flat(value, kind)]
        device = _current[0]
        kernel = _kernels[self.key]
        if device.edit is not None and (changed := device.edit(self.name, kernel)) is not None:
            kernel = changed
        device.run(self.name, self.key, kernel, (x, y, z), self.metadata, values)


# A compiled variant stays with Triton, and its launcher with it, from one device to the next.
_current: list[Device] = []


def _flat(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """The arguments that reach the kernel: the fields of tuples, without constants."""
    if isinstance(kind, tuple):
        for one, its in zip(value, kind, strict=True):
            yield from _flat(one, its)
    elif kind != "constexpr":
        yield value, kind


def _simulated_devices() -> tuple[str, ...]:
    return () if os.environ.get("GATEDCONV_TRITON") == "off" else ("cpu",)


vars(_simulated_devices)["_dynamo_marked_constant"] = True  # as the function that it takes the place of


@contextlib.contextmanager
def simulated(capability: int = 90, seed: int = 0) -> Iterator[Device]:
    """Operators with Triton kernels run them on a simulated GPU; what `torch.empty` returns holds NaN."""
    import triton

    device = Device(capability, seed)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    _current.insert(0, device)
    try:
        with (
            mock.patch.object(triton.runtime.driver, "_active", device),
            mock.patch.object(_triton, "_devices", _simulated_devices),
        ):
            yield device
    finally:
        _current.remove(device)
        torch.use_deterministic_algorithms(deterministic)
