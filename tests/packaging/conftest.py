"""What the packaging tests share: a copy of the project, an sdist, a wheel, an environment for it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"]
FOLDERS = ["gatedconv", "kernels", "csrc", "tests"]


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command in a folder, without the variables that steer a build unless given here."""
    steering = ("GATEDCONV_", "FORCE_CUDA", "CUDA_", "CXX", "TORCH_CUDA", "PYTHONPATH", "MAX_JOBS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(steering)}
    return subprocess.run(
        command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True, check=False
    )


def copy_project(target: Path) -> Path:
    """Copy what a clone holds, and the objects of a build, so that nothing compiles twice."""
    target.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    if (ROOT / "build/objects").is_dir():
        shutil.copytree(ROOT / "build/objects", target / "build/objects")
    return target


def build_wheel(project: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Build a wheel as pip does with --no-build-isolation (an isolated build would fetch setuptools)."""
    folder.mkdir(parents=True, exist_ok=True)
    call = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    return run([sys.executable, "-c", call], project, **variables)


def install(wheel: Path, target: Path) -> Path:
    """Install a wheel alone into a new environment that sees this one's torch, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
    python = target / "bin/python"
    site = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], target).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Folders that a .pth names are searched, but their own .pth files (this checkout, editable) are not read.
    (site / "zz_torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return copy_project(tmp_path_factory.mktemp("copy") / "gatedconv")


@pytest.fixture(scope="session")
def sdist(project, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    call = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = run([sys.executable, "-c", call], project)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def pure_wheel(sdist, tmp_path_factory) -> Path:
    """A wheel without libraries, made from the sdist alone."""
    folder = tmp_path_factory.mktemp("pure")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    done = build_wheel(source, folder / "dist", GATEDCONV_BUILD="off")
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def pure_python(pure_wheel, tmp_path_factory) -> Path:
    return install(pure_wheel, tmp_path_factory.mktemp("environment") / "venv")
