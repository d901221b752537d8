"""The native library, csrc/cpu/gatedconv_plan.h, by ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

NAME = "libgatedconv_plan.so"
VERSION = 1  # GATEDCONV_PLAN_VERSION of csrc/cpu/gatedconv_plan.h, the interface that is declared here

_Size = ctypes.POINTER(ctypes.c_int64)
# Name: result, arguments.
_FUNCTIONS = {
    "version": (ctypes.c_int, []),
    "file_version": (ctypes.c_int, []),
    "error": (ctypes.c_char_p, []),
    "open": (ctypes.c_void_p, [ctypes.c_char_p]),
    "open_memory": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_size_t]),
    "close": (None, [ctypes.c_void_p]),
    "input_size": (None, [ctypes.c_void_p, _Size]),
    "output_size": (ctypes.c_int, [ctypes.c_void_p, _Size, _Size]),
    "workspace": (ctypes.c_int64, [ctypes.c_void_p, _Size, ctypes.c_int]),
    "run": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.c_void_p, _Size, _Size, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int],
    ),
    "metadata": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "describe": (ctypes.c_int64, [ctypes.c_void_p, _Size, ctypes.c_int, ctypes.c_char_p, ctypes.c_int64]),
    "isa": (ctypes.c_char_p, []),
    "release": (ctypes.c_int64, []),
}


def load_library() -> ctypes.CDLL:
    """Load the library that was built with this package.

    Raises:
        ImportError: There is none for this machine, or it is another version's.
    """
    path = Path(__file__).with_name(NAME)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"gatedconv_runtime: {path} cannot be loaded ({error}): install the package again") from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"gatedconv_plan_{name}")
        function.restype, function.argtypes = result, arguments
    if library.gatedconv_plan_version() != VERSION:
        raise ImportError(f"gatedconv_runtime: {path} is another version's: install the package again")
    return library
