"""What a bug report has to say: versions, devices, and which native library runs, or why none does."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from gatedconv import _native

__all__ = ["collect"]

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "safetensors",
    "fvcore",
    "scikit-learn",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "openvino",
)

# The instruction sets that the CPU kernels are built for.
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq")


def collect() -> dict[str, Any]:
    """Collect what ``gatedconv env`` shows; loads, or on first use compiles, the native libraries to tell.

    Returns:
        Dotted names, such as "packages.torch" or "native.cpu.reason", to strings, numbers, lists or None,
        ready for JSON. "native.*.source" is "ahead-of-time", "jit" or "none"; "native.*.reason" says why it
        is not the first.
    """
    found: dict[str, Any] = {
        "gatedconv": _version("gatedconv"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu.model": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cpu.features": [name for name in _CPU_FEATURES if name in (_cpu_info("flags") or "").split()],
        "cpu.cores": os.cpu_count(),
        "cpu.threads": torch.get_num_threads(),
        "cuda.version": torch.version.cuda,
        "cuda.devices": _cuda_devices(),
    }
    for target in ("cpu", "cuda"):
        library = _native.load(target)
        found[f"native.{target}.source"] = library.source
        found[f"native.{target}.path"] = None if library.path is None else str(library.path)
        found[f"native.{target}.reason"] = library.reason
    build = _native.build_info()
    found["build.torch"] = build.get("torch")
    found["build.sources"] = build.get("source_hash")
    return found | {f"packages.{name}": _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info(field: str) -> str | None:
    """Return a field of the first processor in /proc/cpuinfo, None on systems without it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return None


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(index)
        devices.append(f"{it.name}, sm_{it.major}{it.minor}, {it.total_memory / 2**30:.0f} GiB")
    return devices
