"""Stage ``check``: the kernels' tests run natively, then under compute-sanitizer where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.session import ROOT, Session
from benchmarks.gpu.stages import Case, stage
from gatedconv import _native

TESTS = ("tests/kernels/interpreted", "tests/kernels/gpu")
SHARDS = 8  # compiling a kernel takes a second of one core, and there are hundreds of variants
# Our kernels alone, on small shapes: a sanitizer slows a kernel down a hundredfold, and initcheck has things to say
# about cuDNN's.
SANITIZED = "tests/kernels/gpu/test_sanitized.py"
PYTEST = (sys.executable, "-m", "benchmarks.gpu.run_tests")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@stage("check")
def check(session: Session) -> Iterator[Case]:
    """The tests of a folder in shards, at the same time; then the sanitizers one by one."""
    key = ("check", "tests", 0, "", "gatedconv")
    yield Case(key, 30.0, lambda: sharded(session))
    for tool in TOOLS:
        key = ("check", tool, 0, "", "gatedconv")
        yield Case(key, 60.0, lambda tool=tool: sanitized(tool, session))  # type: ignore[misc]


def sharded(session: Session, tests: tuple[str, ...] = TESTS) -> dict[str, Any]:
    """Run all tests; RuntimeError where one fails."""
    count = 2 if session.dry else SHARDS
    _native.load("cuda")  # once: what compiles on first use would do so in every shard
    command = [*PYTEST, "-q", "--maxfail=5", *(tests[-1:] if session.dry else tests)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | {"GATEDCONV_SHARD": f"{i}/{count}"}) for i in range(count)
    ]
    codes = [process.wait() for process in running]  # the watchdog ends what does not end
    failed = [code for code in codes if code not in (0, 5)]  # 5: no tests in this shard
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} shards failed, with exit codes {failed}")
    if all(code == 5 for code in codes):
        raise RuntimeError("no tests ran")
    return {"note": f"passed, {session.left_s:.0f} s left"}


def sanitized(tool: str, session: Session, tests: str = SANITIZED) -> dict[str, Any]:
    """Run a small test of every kernel under a sanitizer; RuntimeError where it finds something."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        return {"note": "not run: compute-sanitizer is not installed"}
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *PYTEST, "-q", tests]
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(session.left_s, 1)).returncode
    except subprocess.TimeoutExpired:
        return {"note": "not finished: out of time"}
    if code:
        raise RuntimeError(f"exit code {code}")
    return {"note": f"passed, {session.left_s:.0f} s left"}
