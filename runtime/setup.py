"""Compiles the library from the sources of gatedconv; a source distribution carries them with it."""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
LIBRARY = "libgatedconv_plan.so"

# In a checkout the sources are gatedconv's own; in a source distribution they are copies that `make_release_tree` made.
CARRIED = HERE / "native"
CSRC = CARRIED / "csrc" if CARRIED.is_dir() else HERE.parent / "csrc"
BUILD = CARRIED / "_build.py" if CARRIED.is_dir() else HERE.parent / "gatedconv" / "_build.py"
OBJECTS = (HERE if CARRIED.is_dir() else HERE.parent) / "build" / "objects"

spec = importlib.util.spec_from_file_location("gatedconv_build", BUILD)
_build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = _build  # dataclasses look up their module there
spec.loader.exec_module(_build)


class BuildLibrary(build_ext):
    """Builds the library, with gatedconv's own flags, so that it computes the same bits."""

    def run(self) -> None:
        """Build into the package in the checkout (editable) or in the wheel."""
        folder = HERE if self.editable_mode else Path(self.build_lib)
        try:
            _build.build("plan", CSRC, folder / "gatedconv_runtime" / LIBRARY, OBJECTS)
        except _build.BuildError as error:
            sys.exit(f"gatedconv-runtime: {error}")

    def get_outputs(self) -> list[str]:
        """List the file that goes into a wheel along with the Python files."""
        return [str(Path(self.build_lib) / "gatedconv_runtime" / LIBRARY)]

    def get_output_mapping(self) -> dict[str, str]:
        """In editable mode the library is built into the checkout, so nothing is copied."""
        return {}


class SourceDistribution(sdist):
    """Carries the C++ sources and the file that compiles them."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy what gatedconv keeps elsewhere."""
        super().make_release_tree(base_dir, files)
        carried = Path(base_dir) / "native"
        sources = _build.source_files(CSRC, "plan", any_machine=True)
        (carried / "csrc" / "cpu").mkdir(parents=True)
        for path in [*sources, *(CSRC / "cpu").glob("*.h")]:
            shutil.copyfile(path, carried / "csrc" / "cpu" / path.name)
        shutil.copyfile(BUILD, carried / "_build.py")


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: the library contains no symbol of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    # The extension is a stand-in that makes setuptools call build_ext and treat the wheel as platform-specific.
    ext_modules=[Extension("gatedconv_runtime.library", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "sdist": SourceDistribution, "bdist_wheel": Wheel},
)
