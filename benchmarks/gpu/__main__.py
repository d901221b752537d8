"""Runs stages: ``python -m benchmarks.gpu [--dry] [STAGE ...]``, all of them by default.

``bench-engine`` stands for all stages whose names begin with it. Each runs in a process of its own, which is ended
after eight and a half minutes; rows are in a file by then, and the table is printed last. Exit code 1 where rows
failed, 124 where a stage was ended, 2, with one line, for an unknown stage or where there is no GPU. ``--dry`` walks
through all of it on a CPU with the smallest cases and keeps nothing.

Rows are kept in benchmarks/results; where the environment has OUT, in that folder, too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.session import LIMIT_S, ROOT, Session, short_name
from benchmarks.gpu.stages import find_stage, run_cases, stage_names
from benchmarks.gpu.watch import watch

DRY_LIMIT_S = 200.0


def main(arguments: list[str]) -> int:
    """Run the stages named and return the first exit code that is not 0."""
    dry = "--dry" in arguments
    names = [argument for argument in arguments if argument != "--dry"]
    if names[:1] == ["--child"]:
        return child(names[1], Path(names[2]), [Path(name) for name in names[3:]], dry)
    unknown = [name for name in names if not matching(name)]
    if unknown:
        return fail(f"no stage {unknown[0]!r}; there are: {', '.join(stage_names())}")
    chosen = [stage for name in names for stage in matching(name)]
    try:
        prepare()
        import torch
    except ImportError as error:
        return fail(f"{error}; the stages need torch and triton")
    if not dry and not torch.cuda.is_available():
        return fail("no CUDA device is visible; the stages need one")
    codes = [run_stage(name, dry) for name in chosen or stage_names()]
    return next((code for code in codes if code), 0)


def matching(name: str) -> list[str]:
    """The stage of that name, or else all whose names go on from it: ``bench-engine`` for its parts."""
    return [name] if name in stage_names() else [stage for stage in stage_names() if stage.startswith(f"{name}-")]


def run_stage(name: str, dry: bool) -> int:
    """Run one stage in its own process."""
    print(f"== {name}", flush=True)
    found = find_stage(name)
    if found is None:
        print(f"{name}: nothing to run, its cases are not part of this checkout")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        results = [Path(folder)] if dry else result_folders()
        session = open_session(results, progress, dry)
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, str(progress), *map(str, results)]
        code = watch([*command, *(["--dry"] if dry else [])], session, found[1])
    sys.stdout.flush()
    return code


def result_folders() -> list[Path]:
    """Where rows are kept; first where those of earlier runs are looked for."""
    out = os.environ.get("OUT")
    return [ROOT / "benchmarks" / "results", *([Path(out).absolute()] if out else [])]


def child(name: str, progress: Path, results: Sequence[Path], dry: bool) -> int:
    """Run a stage's cases, in the process that is watched."""
    prepare()
    found = find_stage(name)
    assert found is not None
    session = open_session(results, progress, dry)
    run_cases(session, found[0](session))
    return 0


def open_session(results: Sequence[Path], progress: Path, dry: bool) -> Session:
    """A session on the GPU that is there."""
    import torch
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    device = "dry" if dry else short_name(torch.cuda.get_device_name())
    limit_s = DRY_LIMIT_S if dry else LIMIT_S
    return Session(device, versions, results[0], limit_s, progress, dry, copies=results[1:])


def prepare() -> None:
    """Make ``gatedconv.kernels`` importable from a checkout that is not installed."""
    import gatedconv  # noqa: F401

    if importlib.util.find_spec("gatedconv.kernels") is None:
        folder = ROOT / "kernels"
        spec = importlib.util.spec_from_file_location(
            "gatedconv.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules["gatedconv.kernels"] = module
        spec.loader.exec_module(module)


def fail(line: str) -> int:
    """Say what is wrong and return exit code 2."""
    print(f"gpu: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
