"""Without a GPU the kernels run under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / "interpreted"


def interpreter_fails() -> bool:
    """Whether the interpreter makes integers of arrays with one element, as Triton 3.6's does; NumPy 2.4 refuses."""
    if np.lib.NumpyVersion(np.__version__) < "2.4.0" or importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import interpreter

    return "int(self.handle.data))" in inspect.getsource(interpreter)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively here")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the same tests run in this process")
@pytest.mark.skipif(interpreter_fails(), reason="this Triton's interpreter fails with NumPy 2.4 and later")
@pytest.mark.timeout(900)
def test_kernels_match_their_references():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "GATEDCONV_TRITON": "auto"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout and " failed" not in result.stdout and " skipped" not in result.stdout
