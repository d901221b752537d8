"""Where a result comes from: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("gatedconv", "torch", "torchvision", "numpy", "fvcore", "scikit-learn", "onnx")


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, commit of the checkout (None for an installed package), device and threads."""
    return {
        "versions": versions(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on, those that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that this package's source stands at, with "+changes" if files differ from it.

    Where git does not tell, as in a copy without its history, GATEDCONV_COMMIT of the environment does.
    """
    folder = Path(__file__).parent
    head = _git(folder, "rev-parse", "HEAD")
    if head is None or _git(folder, "ls-files", "--error-unmatch", __file__) is None:
        return os.environ.get("GATEDCONV_COMMIT") or None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
