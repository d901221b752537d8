"""Stage ``check``: the kernels' tests run natively, then under compute-sanitizer where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from benchmarks.gpu.session import ROOT, Session, columns
from benchmarks.gpu.stages import stage

TESTS = ("tests/kernels/interpreted", "tests/kernels/gpu")
# Small shapes: a sanitizer slows a kernel down a hundredfold.
SANITIZED = "tests/kernels/gpu/test_gpu.py::test_a_small_step_runs"
PYTEST = (sys.executable, "-m", "benchmarks.gpu.run_tests")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@stage("check")
def check(session: Session) -> int:
    """Return 0 if all tests pass and no sanitizer finds anything."""
    lines = [("check", "result", "seconds left")]
    code = run([*PYTEST, "-q", "--maxfail=5", *TESTS], session)
    lines.append(("tests", result(code), f"{session.left_s:.0f}"))
    worst = code
    sanitizer = shutil.which("compute-sanitizer")
    for tool in TOOLS:
        if sanitizer is None:
            lines.append((tool, "not run: compute-sanitizer is not installed", ""))
        elif not session.has(60):
            lines.append((tool, "not run: out of time", ""))
        else:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            code = run([*command, *PYTEST, "-q", SANITIZED], session)
            lines.append((tool, result(code), f"{session.left_s:.0f}"))
            worst = worst or code
    print(columns(lines))
    return worst


def run(command: list[str], session: Session) -> int:
    """Exit code of a command; 124 where the stage's time ran out."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--tool" in command else os.environ
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=max(session.left_s, 1)).returncode
    except subprocess.TimeoutExpired:
        return 124


def result(code: int) -> str:
    """What an exit code says."""
    return {0: "passed", 124: "out of time", 5: "no tests ran"}.get(code, f"failed ({code})")
