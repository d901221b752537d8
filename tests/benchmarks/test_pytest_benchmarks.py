"""`pytest benchmarks` itself, on one small case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASE = "benchmarks/test_masked_conv2d.py::test_layer[n8-i64-o64-h8-k3-open50]"


def run(*options: object) -> str:
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which this one is no part of.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            CASE,
            "-q",
            "-p",
            "no:cacheprovider",
            "--rounds=2",
            "--threads=1",
            *(str(option) for option in options),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_case_is_measured_and_its_rows_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    saved = tmp_path / "benchmark.json"
    text = run(f"--benchmark-json={saved}")
    assert "fastest setting of each provider" in text and "1 passed" in text
    (kept,) = json.loads(saved.read_text())["benchmarks"]
    rows = kept["extra_info"]["rows"]
    assert kept["stats"]["rounds"] == 2 and not kept["extra_info"]["failures"]
    assert len(rows) == 10 and all(row["rounds"] == 2 and row["ms_min"] > 0 for row in rows)
    assert all((row["ratio"] is None) == (row["provider"] == "gatedconv") for row in rows)
