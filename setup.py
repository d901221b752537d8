"""Adds to pyproject.toml what it cannot express: the mapped packages and the native libraries.

gatedconv/_build.py builds the libraries and documents the variables (GATEDCONV_BUILD, FORCE_CUDA, ...).
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

spec = importlib.util.spec_from_file_location("gatedconv_build", ROOT / "gatedconv" / "_build.py")
_build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = _build  # dataclasses look up their module there
spec.loader.exec_module(_build)

try:
    MODE = _build.build_mode()
except _build.BuildError as error:
    sys.exit(str(error))


class BuildLibraries(build_ext):
    """Builds the libraries with the package's own list of sources and flags, and records the outcome."""

    def run(self) -> None:
        """Build into the checkout (editable) or into the wheel; a library that cannot be built is left out."""
        folder = (ROOT if self.editable_mode else Path(self.build_lib)) / "gatedconv"
        reasons = _build.build_all(
            CSRC, ROOT / "build" / "objects", lambda target: folder / _build.library_name(target), self.announce_line
        )
        _build.write_build_info(folder, CSRC, reasons)

    def get_outputs(self) -> list[str]:
        """List the files that go into a wheel along with the Python files."""
        folder = Path(self.build_lib) / "gatedconv"
        return [str(path) for path in (*folder.glob("_C_*.so"), folder / "_build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        """In editable mode the libraries are built into the checkout, so nothing is copied."""
        return {}

    def announce_line(self, text: str) -> None:
        """Print a step of the build; pip shows it with -v."""
        print(f"gatedconv: {text}", file=sys.stderr, flush=True)


class BuildPython(build_py):
    """Copies the Python files; with GATEDCONV_BUILD=off it records that no library was built."""

    def run(self) -> None:
        """Copy, then record."""
        super().run()
        if MODE == "off" and not self.editable_mode:
            folder = Path(self.build_lib) / "gatedconv"
            _build.write_build_info(folder, CSRC, _build.build_all(CSRC, ROOT, Path))


class Wheel(bdist_wheel):
    """Tags a wheel with libraries py3-none-PLATFORM: they contain no symbol of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag; a wheel without libraries serves every platform."""
        if MODE == "off":
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


csrc_packages = ["gatedconv._csrc"] + [
    f"gatedconv._csrc.{path.relative_to(CSRC).as_posix().replace('/', '.')}"
    for path in sorted(CSRC.rglob("*"))
    if path.is_dir()
]

setup(
    packages=[*find_packages(include=["gatedconv", "gatedconv.*"]), "gatedconv.kernels", *csrc_packages],
    package_dir={"gatedconv.kernels": "kernels", "gatedconv._csrc": "csrc"},
    package_data={"gatedconv": ["py.typed"], **dict.fromkeys(csrc_packages, ["*.cpp", "*.cu", "*.h", "*.cuh"])},
    # The extension is a stand-in that makes setuptools call build_ext and treat the wheel as platform-specific.
    ext_modules=[] if MODE == "off" else [Extension("gatedconv._C_cpu", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
