"""What training launches compiles for every supported GPU, and fits it, without a GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.recording import kernel_names

ROOT = Path(__file__).parents[2]
# What a thread may spill: a fifth of the bytes of its 255 registers. ptxas keeps a register or two in local memory in
# some corners, how many differs with its version; a tile that is too large spills hundreds.
SPILL_BYTES = 255 * 4 // 5


def test_every_kernel_compiles_and_fits():
    rows = compiled("few", "90")
    assert {row["kernel"] for row in rows} == kernel_names()
    assert_fits(rows, 90)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90])
def test_what_a_network_launches_compiles_and_fits(capability):
    rows = compiled("some", str(capability))
    assert {row["kernel"] for row in rows} == kernel_names()
    assert_fits(rows, capability)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("GATEDCONV_ALL_CUBINS"), reason="hours of one core; set GATEDCONV_ALL_CUBINS=1")
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90])
def test_every_variant_compiles_and_fits(capability):
    """Every estimator, depth, pool, mode, dtype, layout and stage: hundreds of kernels a generation."""
    assert_fits(compiled("all", str(capability)), capability)


def assert_fits(rows, capability):
    """At most the shared memory that every generation has by default, no large spills, and sums in a fixed order."""
    for row in rows:
        assert row["capability"] == capability
        assert row["shared"] <= 48 * 1024, row
        assert 0 < row["registers"] <= 255 and row["stack"] + row["local"] <= SPILL_BYTES, row
        assert not (row["reduces"] and row["fused"]), row


def compiled(which, capability):
    """Rows of what ``tests.kernels.cubins`` prints."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.cubins", which, capability]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]
