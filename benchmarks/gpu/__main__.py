"""Runs stages: ``python -m benchmarks.gpu [STAGE ...]``, all of them by default, each in its own process.

Exit code 2, with one line, for an unknown stage or where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from benchmarks.gpu.session import ROOT, Session, short_name
from benchmarks.gpu.stages import all_stages


def main(names: list[str]) -> int:
    """Run the stages named and return the first exit code that is not 0."""
    try:
        prepare()
        stages = all_stages()
    except ImportError as error:
        return fail(f"{error}; the stages need torch and triton")
    unknown = [name for name in names if name not in stages]
    if unknown:
        return fail(f"no stage {unknown[0]!r}; there are: {', '.join(stages)}")
    import torch

    if not torch.cuda.is_available():
        return fail("no CUDA device is visible; the stages need one")
    names = names or list(stages)
    if len(names) > 1:  # what one stage leaves in memory, caches and compiled code must not touch the next
        codes = [
            subprocess.run([sys.executable, "-m", "benchmarks.gpu", name], cwd=ROOT).returncode
            for name in names
        ]
        return next((code for code in codes if code), 0)
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return stages[names[0]](Session(short_name(torch.cuda.get_device_name()), versions))


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
