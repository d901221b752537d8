"""Training runs of the experiment table on a GPU, for minutes at a time: ``python -m benchmarks.gpu.experiments``.

Nothing has to be installed but the packages of `preflight`. A call ends within nine minutes; what it leaves in OUT is
FROM of the next one, which goes on exactly there; ``python -m benchmarks.gpu.merge OUT`` takes rows into ``results/``.
docs/scaling.md tells the whole of it. Exit code: 0 nothing is left, 3 time was up, 1 a run failed, 2 nothing was run.

Environment:

EXPERIMENTS       names or patterns (default: the headline and its controls)
SEEDS             of them (default: all)
JOBS              processes side by side (default 3)
MINUTES           of training (default 7.5); a call takes up to 1.25 more
SOURCES           such as ``cifar10=npz:data/cifar10.npz``; archives in STORE (`data`) are found without
FROM              folders of archives of earlier calls, at whatever depth, or archives; a run that is in several goes on
                  from where it is furthest
OUT               folder for archives (default runs/gpu-packs): at most 7 files of 16 MB, 61.5 MB together
WORK              folder of run folders and ledger (default runs/gpu); goes on from what is there
DEVICE            default cuda
AMP               mixed precision of all runs (default: each recipe's own; ours take bf16, the paper's none)
CUDA_GRAPH        1: replay each training step as one CUDA graph, which ``check-train`` checks first (default 0)
GATEDCONV_COMMIT  commit of the source, for the ledger, where there is no .git
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.gpu.__main__ import fail, prepare


def main(arguments: list[str]) -> int:
    """Make a call, or be one of its processes; the exit code."""
    try:
        prepare()
        if arguments[:1] == ["--child"]:
            from gatedconv.cli import main as gatedconv

            return gatedconv(arguments[1:])
        from benchmarks.gpu.preflight import require_all

        require_all(os.environ.get("DEVICE") or "cuda")
        from benchmarks.gpu.calls import call, work
        from benchmarks.gpu.settings import Settings

        settings = Settings.read(os.environ, Path.cwd())
        return work(settings) if arguments[:1] == ["--worker"] else call(settings)
    except (ValueError, OSError, ImportError) as error:
        return fail(f"experiments: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
