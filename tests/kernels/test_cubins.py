"""Every kernel compiles for every supported GPU, and fits it, without a GPU at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# ptxas reports a stack of one or two spilled registers in some corners; anything above is a tile that is too
# large.
STACK_BYTES = 16


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90])
def test_every_kernel_compiles_and_fits(capability):
    for row in compiled(str(capability)):
        assert row["capability"] == capability
        assert row["shared"] <= 48 * 1024, row
        assert 0 < row["registers"] <= 255 and row["stack"] <= STACK_BYTES and row["local"] == 0, row


@pytest.mark.timeout(600)
def test_sizes_of_one_compile():
    assert all(row["registers"] > 0 for row in compiled("ones"))


def compiled(argument):
    """Rows of what ``tests.kernels.cubins`` prints: every kernel is among them."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.cubins", argument]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == kernel_names()
    return rows


def kernel_names():
    """Kernels are what the launchers launch: ``name[(grid)](...)`` or ``name[grid](...)``."""
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    return {name for source in sources for name in re.findall(r"^ +([a-z_]+)\[\(", source, re.MULTILINE)}
