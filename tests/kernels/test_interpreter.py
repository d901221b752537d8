"""Without a GPU the kernels run under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively here")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the same tests run in this process")
@pytest.mark.timeout(900)
def test_kernels_match_their_references():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "GATEDCONV_TRITON": "auto"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout and " failed" not in result.stdout and " skipped" not in result.stdout
