"""What nvcc and the host's compiler make of csrc/, compiled once for every state of the sources."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from gatedconv import _build
from gatedconv._io import locked, write_atomic
from tests.ptx.parser import Kernel, parse

ROOT = Path(__file__).parents[2]
CSRC, CACHE = ROOT / "csrc", ROOT / "build" / "ptx"


@functools.cache
def nvcc() -> list[str]:
    """Return the command of nvcc; the test is skipped where there is none."""
    try:
        return [str(_build.find_toolkit().root / "bin/nvcc"), "-std=c++20", "-O3", "-DUSE_CUDA"]
    except _build.BuildError as error:
        pytest.skip(f"no nvcc: {error}")


@functools.cache
def kernels(source: str, architecture: int) -> dict[str, Kernel]:
    """Return the kernels of a file below csrc by their mangled names.

    Args:
        source: "cuda/conv_f16.cu".
        architecture: 75, 80 or 90.
    """
    command = [*nvcc(), f"-arch=sm_{architecture}", "-ptx"]
    return parse(_compiled(command, CSRC / source, ".ptx").read_text())


@functools.cache
def host() -> ctypes.CDLL:
    """Return the functions of host.cpp."""
    command = [*shlex.split(_build.find_compiler()), "-std=c++20", "-O1", "-shared", "-fPIC"]
    library = ctypes.CDLL(str(_compiled(command, Path(__file__).parent / "host.cpp", ".so")))
    library.packed.restype = ctypes.c_int64
    return library


def _compiled(command: list[str], source: Path, suffix: str) -> Path:
    """The file that a command makes of a source, from the cache if nothing that goes into it has changed."""
    headers = [path.read_bytes() for part in ("cuda", "shared") for path in sorted((CSRC / part).rglob("*.*h"))]
    digest = hashlib.sha256("\0".join(command).encode() + b"".join(headers) + source.read_bytes()).hexdigest()[:16]
    finished = CACHE / f"{source.stem}-{digest}{suffix}"
    with locked(finished.with_suffix(".lock")):  # workers that want the same wait for one
        if finished.exists():
            return finished
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / finished.name
            done = subprocess.run([*command, f"-I{CSRC}", str(source), "-o", str(part)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            write_atomic(finished, part.read_bytes())
    return finished
