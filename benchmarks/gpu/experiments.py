"""Training runs of the experiment table on a GPU that is lent for minutes: ``python -m benchmarks.gpu.experiments``.

Environment: ``EXPERIMENTS``, names or patterns (default: the headline and its controls); ``JOBS``, processes side by
side (default 4); ``SOURCES``, such as ``cifar10=npz:data/cifar10.npz``; ``OUT``, the folder for run folders, ledger and
epochs; ``FROM``, what an earlier call left there, which is copied first. A call ends within nine minutes; call it until
it says that nothing is left.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gatedconv.cli import main

LIMIT_S = 510.0  # nine minutes less what starting and ending takes
_FINISHING_S = 45.0  # a run whose training ends late is still frozen, cut and measured


def arguments(environment: Mapping[str, str], left_s: float, root: Path) -> list[str]:
    """What `gatedconv` is called with."""
    out = Path(environment.get("OUT") or root / "runs" / "gpu")
    names = (environment.get("EXPERIMENTS") or "headline-r56-c10*").split()
    minutes = max(0.1, (left_s - _FINISHING_S) / 60)
    found = ["report", "run", *names, "--jobs", environment.get("JOBS") or "4", "--max-minutes", f"{minutes:.2f}"]
    found += ["--device", "cuda", "--runs", str(out / "runs"), "--results", str(out / "results")]
    for source in (environment.get("SOURCES") or "").split():
        found += ["--source", source]
    return found


def run() -> int:
    """Run for as long as a call may, and leave checkpoints; the exit code is that of `gatedconv report run`."""
    started, root = time.monotonic(), Path.cwd()
    before, out = os.environ.get("FROM"), os.environ.get("OUT")
    if before and out:
        shutil.copytree(before, out, dirs_exist_ok=True)
    code = main(arguments(os.environ, LIMIT_S - (time.monotonic() - started), root))
    print({0: "nothing is left", 3: "time is up: call it again"}.get(code, f"failed with exit code {code}"))
    return code


if __name__ == "__main__":
    sys.exit(run())
