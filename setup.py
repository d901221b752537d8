"""Adds to pyproject.toml what it cannot say: the mapped packages and the native libraries.

GATEDCONV_BUILD=auto (the default) builds what this machine can build and installs without the rest, the
reason kept for ``gatedconv env``; ``off`` builds nothing; ``require`` fails where something cannot be built.
The CUDA library is part of it where torch has CUDA and a toolkit of the same major version is there;
FORCE_CUDA=1 makes it a must under ``require``, FORCE_CUDA=0 leaves it out.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODE = os.environ.get("GATEDCONV_BUILD", "auto")

if MODE not in ("auto", "off", "require"):
    sys.exit(f"GATEDCONV_BUILD: expected auto, off or require, got {MODE!r}")

spec = importlib.util.spec_from_file_location("gatedconv_build", ROOT / "gatedconv" / "_build.py")
_build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = _build  # dataclasses look their module up there
spec.loader.exec_module(_build)


def missing() -> dict[str, str]:
    """Say per library why it is not even tried here."""
    if MODE == "off":
        return dict.fromkeys(_build.TARGETS, "left out: GATEDCONV_BUILD=off")
    try:
        torch = _build.find_torch()
        _build.find_compiler()
    except _build.BuildError as error:
        return dict.fromkeys(_build.TARGETS, str(error))
    try:
        _build.check_cuda(torch)
    except _build.BuildError as error:
        return {"cuda": str(error)}
    return {}


# Asking for torch costs a process; commands that only read metadata need no answer.
BUILDS = any(
    word in sys.argv for word in ("build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop")
)
REASONS = missing() if BUILDS else {}

if MODE == "require" and ("cpu" in REASONS or ("cuda" in REASONS and os.environ.get("FORCE_CUDA") == "1")):
    sys.exit("GATEDCONV_BUILD=require: " + REASONS.get("cpu", REASONS["cuda"]))


class BuildLibraries(build_ext):
    """Builds the libraries with the package's own flag list and writes down how it went."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the plain library name: it holds no Python symbol, so no Python version belongs in it."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        """Build each library; drop and report one that fails, unless GATEDCONV_BUILD=require."""
        outcome = dict(REASONS)
        for extension in list(self.extensions):
            target = extension.name.rsplit("_C_", 1)[1]
            try:
                cache = ROOT / "build" / "objects"
                _build.build(target, CSRC, Path(self.get_ext_fullpath(extension.name)), cache)
            except _build.BuildError as error:
                if MODE == "require":
                    raise
                outcome[target] = str(error)
                # A list of its own: setuptools decided from the distribution's where the package goes.
                self.extensions = [other for other in self.extensions if other is not extension]
        folder = ROOT / "gatedconv" if self.editable_mode else Path(self.build_lib) / "gatedconv"
        write_outcome(folder, outcome)


class BuildPython(build_py):
    """Copies the Python files and notes why libraries are not tried; a build that is tried writes over it."""

    def run(self) -> None:
        """Copy, then write the reasons."""
        super().run()
        write_outcome(
            ROOT / "gatedconv" if self.editable_mode else Path(self.build_lib) / "gatedconv", REASONS
        )


def write_outcome(folder: Path, reasons: dict[str, str]) -> None:
    """Write what ``gatedconv env`` shows: from which source, and the reason for what was not built."""
    for target, reason in reasons.items():
        print(f"gatedconv: the {target} library is not built: {reason}", file=sys.stderr)
    try:
        torch = _build.find_torch().version
    except _build.BuildError:
        torch = None
    info = {"source_hash": _build.source_hash(CSRC), "torch": torch, "reasons": reasons}
    folder.mkdir(parents=True, exist_ok=True)
    for target in reasons:  # what an earlier build may have left
        (folder / _build.library_name(target)).unlink(missing_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


native = [
    Extension(f"gatedconv._C_{target}", sources=[]) for target in _build.TARGETS if target not in REASONS
]
csrc_packages = ["gatedconv._csrc"] + [
    f"gatedconv._csrc.{path.name}" for path in sorted(CSRC.iterdir()) if path.is_dir()
]

setup(
    packages=[*find_packages(include=["gatedconv", "gatedconv.*"]), "gatedconv.kernels", *csrc_packages],
    package_dir={"gatedconv.kernels": "kernels", "gatedconv._csrc": "csrc"},
    package_data={
        "gatedconv": ["py.typed"],
        **dict.fromkeys(csrc_packages, ["*.cpp", "*.cu", "*.h", "*.cuh"]),
    },
    ext_modules=native if BUILDS else [],
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython},
    # The libraries are free of Python's ABI, so a wheel with them serves every Python.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
