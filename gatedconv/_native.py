"""Loads the native libraries: the built one, else one compiled on first use, else none (the references run).

Nothing is loaded or compiled at import. The first native call decides, once per process and library. The outcome is
kept, including a failure, so that a broken compiler costs its seconds once and warns once.

``GATEDCONV_NATIVE`` narrows the choice: ``auto`` (the default), ``aot`` (only the built library), ``jit``
(only one compiled on first use) or ``off`` (the references).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatedconv import _build
from gatedconv._io import locked

_PACKAGE = Path(__file__).resolve().parent
_log = logging.getLogger("gatedconv")
_lock = threading.RLock()
_loaded: dict[str, Library] = {}


@dataclass(frozen=True)
class Library:
    """How a library ended up in this process.

    Attributes:
        target: "cpu" or "cuda".
        source: "ahead-of-time", "jit" or "none".
        path: The file that is loaded, None without one.
        reason: Why it is not the ahead-of-time library, None if it is.
    """

    target: str
    source: str
    path: Path | None
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether native operators of this library can be called."""
        return self.path is not None


def source_folder() -> Path:
    """Return the folder of the C++ sources: in the installed package, or next to it in a checkout."""
    installed = _PACKAGE / "_csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def cache_folder() -> Path:
    """Return the folder of what is compiled on first use: GATEDCONV_CACHE, else the user's cache."""
    named = os.environ.get("GATEDCONV_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gatedconv"


def build_info() -> dict[str, Any]:
    """Return what the installation recorded about its build, empty where it recorded nothing."""
    try:
        info = json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def load(target: str = "cpu") -> Library:
    """Load the library for ``target`` ("cpu" or "cuda") unless this process has tried already.

    The CUDA library adds to the operators that the CPU library declares, so it comes after that one and, for
    the two to be of one build, from the same source.
    """
    library = _loaded.get(target)
    if library is not None:
        return library
    with _lock:
        if target not in _loaded:
            _loaded[target] = _load_first(target)
        return _loaded[target]


def _load_first(target: str) -> Library:
    wanted = os.environ.get("GATEDCONV_NATIVE", "auto")
    if wanted not in ("auto", "aot", "jit", "off"):
        raise ValueError(f"GATEDCONV_NATIVE: expected auto, aot, jit or off, got {wanted!r}")
    if wanted == "off":
        return Library(target, "none", None, "GATEDCONV_NATIVE=off")
    base = load("cpu") if target != "cpu" else None
    if base is not None and not base.available:
        return Library(target, "none", None, f"the cpu library is missing: {base.reason}")
    reasons = []
    if wanted != "jit" and (base is None or base.source == "ahead-of-time"):
        reason = _ahead_of_time_reason(target)
        path = _PACKAGE / _build.library_name(target)
        if reason is None:
            reason = _load_file(path)
            if reason is None:
                return Library(target, "ahead-of-time", path, None)
        reasons.append(f"ahead-of-time: {reason}")
    if wanted != "aot" and (base is None or base.source == "jit"):
        try:
            path = _compile(target)
            reason = _load_file(path)
        except (_build.BuildError, OSError) as error:
            reason = str(error)
        if reason is None:
            return Library(target, "jit", path, "; ".join(reasons) or None)
        reasons.append(f"compiled on first use: {reason}")
    library = Library(target, "none", None, "; ".join(reasons))
    if target == "cpu" or torch.cuda.is_available():
        message = f"gatedconv: no native {target} library, the PyTorch references run instead"
        warnings.warn(f"{message}. {library.reason}", RuntimeWarning, stacklevel=3)
    return library


def _ahead_of_time_reason(target: str) -> str | None:
    """Return why the built library cannot be used, None if it can."""
    info = build_info()
    if not (_PACKAGE / _build.library_name(target)).exists():
        reasons = info.get("reasons", {})
        return str(reasons.get(target, "not built when gatedconv was installed"))
    if info.get("source_hash") != _build.source_hash(source_folder()):
        return "the built library is older than its sources; install gatedconv again to renew it"
    return None


def _compile(target: str) -> Path:
    if os.environ.get("GATEDCONV_BUILD") == "off":
        raise _build.BuildError("GATEDCONV_BUILD=off")
    if target == "cuda" and not torch.cuda.is_available():
        raise _build.BuildError("there is no CUDA device to compile for")
    csrc = source_folder()
    torch_version = torch.__version__.replace("/", "-")
    folder = cache_folder() / f"{_build.source_hash(csrc)}-torch-{torch_version}"
    path = folder / _build.library_name(target)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not path.exists():  # another process may have built it in the meantime
                _log.warning("compiling the %s library on first use into %s; this takes minutes", target, folder)
                _build.build(target, csrc, path, cache_folder() / "objects", _log.info)
    return path


def _load_file(path: Path) -> str | None:
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    return None
