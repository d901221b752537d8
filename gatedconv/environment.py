"""The environment report and the provenance of results: versions, commit, devices, native libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gatedconv import _native

# Packages that a result depends on; the environment report has the optional ones, too.
_PACKAGES = ("gatedconv", "torch", "torchvision", "numpy", "fvcore", "scikit-learn", "onnx")
_OPTIONAL = ("triton", "safetensors", "matplotlib", "onnxruntime", "openvino")

# The instruction sets that the CPU kernels are built for, and those that make bf16 fast in PyTorch.
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_bf16")

_GET_CUDA = (
    "install torch with CUDA and the CUDA toolkit (nvcc) of the same major version, then: "
    "FORCE_CUDA=1 GATEDCONV_BUILD=require pip install --no-build-isolation --force-reinstall --no-deps gatedconv; "
    "on a machine with a GPU the library is otherwise compiled on first use"
)


def collect() -> dict[str, Any]:
    """Collect what ``gatedconv env`` shows; loads the native libraries, or compiles them on first use.

    Returns:
        Dotted names, such as "packages.torch" or "native.cpu.reason", to strings, numbers, lists or None,
        ready for JSON. "native.*.source" is "ahead-of-time", "jit" or "none"; "native.*.reason" is why it
        is not the first; "native.cuda.get", where the CUDA library is missing, how to get it.
    """
    found: dict[str, Any] = {
        "gatedconv": version("gatedconv"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu.model": cpu_info("model name") or platform.processor() or platform.machine(),
        "cpu.features": [name for name in _CPU_FEATURES if name in (cpu_info("flags") or "").split()],
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
        if target == "cuda" and not library.available:
            found["native.cuda.get"] = _GET_CUDA
    build = _native.build_info()
    found["build.torch"] = build.get("torch")
    found["build.sources"] = build.get("source_hash")
    return found | {f"packages.{name}": version(name) for name in (*_PACKAGES[1:], *_OPTIONAL)}


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, commit of the checkout (None for an installed package), device name and CPU threads."""
    return {
        "versions": versions(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that results depend on, and of ``more``; only of those installed."""
    found = {name: number for name in (*_PACKAGES, *more) if (number := version(name)) is not None}
    return {"python": sys.version.split()[0], **found}


def version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_NO_CODE = tuple(f":(top,exclude){name}" for name in ("benchmarks/results", "results", "docs", "README.md"))


def commit() -> str | None:
    """The commit of the checkout that this package is imported from, with "+changes" if its code differs.

    Results and documents are written with a commit in them and count as no code.

    Outside of a git checkout: GATEDCONV_COMMIT of the environment, or None.
    """
    folder = Path(__file__).parent
    head = _git(folder, "rev-parse", "HEAD")
    if head is None or _git(folder, "ls-files", "--error-unmatch", __file__) is None:
        return os.environ.get("GATEDCONV_COMMIT") or None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "-uno", "--", ":/", *_NO_CODE) else "")


def cpu_info(field: str) -> str | None:
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


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(index)
        devices.append(f"{it.name}, sm_{it.major}{it.minor}, {it.total_memory / 2**30:.0f} GiB")
    return devices
