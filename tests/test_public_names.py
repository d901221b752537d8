"""The public face: every name is importable, documented and in the API reference; examples use no other names."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gatedconv

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMESPACES = {"models", "ops", "schedules"}


def test_star_import_needs_no_extra():
    program = """
import sys
sys.modules["huggingface_hub"] = None
from gatedconv import *
assert Engine and GatePruner and models.resnet20
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_shows_every_public_name():
    text = pydoc.plain(pydoc.render_doc(gatedconv))
    assert not [name for name in gatedconv.__all__ if name not in text]


@pytest.mark.parametrize("name", gatedconv.__all__)
def test_every_public_name_is_documented(name):
    found = getattr(gatedconv, name)
    assert found.__doc__ and len(found.__doc__) > 40
    if name not in NAMESPACES:
        assert f"::: gatedconv.{name}\n" in (ROOT / "docs" / "api.md").read_text()


def test_the_name_that_requires_an_extra_is_documented():
    assert "HubModel" in gatedconv.__doc__
    assert "::: gatedconv.HubModel\n" in (ROOT / "docs" / "api.md").read_text()


def test_all_is_sorted_and_complete():
    classes_first = sorted(gatedconv.__all__, key=lambda name: (not name[0].isupper(), name))
    assert gatedconv.__all__ == classes_first
    public = {name for name in vars(gatedconv) if not name.startswith("_")}
    modules = {path.stem for path in (ROOT / "gatedconv").iterdir() if not path.stem.startswith("_")}
    assert public - modules - NAMESPACES - {"Any", "torch", "kernels"} == set(gatedconv.__all__) - NAMESPACES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_public_names_only(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gatedconv"):
            pytest.fail(f"{path.name}:{node.lineno} imports from {node.module}")
        if isinstance(node, ast.Import):
            inner = [alias.name for alias in node.names if alias.name.startswith("gatedconv.")]
            assert not inner, f"{path.name}:{node.lineno} imports {inner}"
    names = set(re.findall(r"\bgatedconv\.(\w+(?:\.\w+)?)", ast.unparse(tree)))
    for name in names:
        first, _, second = name.partition(".")
        assert first in gatedconv.__all__, f"{path.name}: gatedconv.{first} is not public"
        assert not second or first in NAMESPACES and second in getattr(gatedconv, first).__all__, name


@pytest.mark.parametrize(
    ("place", "pattern"),
    [
        ("pyproject.toml", r'^version = "(.+)"'),
        ("runtime/pyproject.toml", r'^version = "(.+)"'),
        ("runtime/gatedconv_runtime/__init__.py", r'^__version__ = "(.+)"'),
        ("runtime/CMakeLists.txt", r"^project\(\w+ VERSION (\S+)"),
    ],
)
def test_every_part_has_the_same_version(place, pattern):
    assert re.findall(pattern, (ROOT / place).read_text(), re.M) == [gatedconv.__version__]
