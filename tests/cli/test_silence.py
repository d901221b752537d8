"""Nothing below the command line prints: a library reports by return values, errors and callbacks."""

from __future__ import annotations

import ast

import pytest

from tests.test_imports import layer_of, python_modules


def prints(source: str) -> list[int]:
    """Lines that call print or name the process's own output streams."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr", "__stdout__", "__stderr__"))
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
        or (isinstance(node, ast.ImportFrom) and node.module == "sys")
        and {alias.name for alias in node.names} & {"stdout", "stderr"}
    ]


def test_nothing_below_the_command_line_prints() -> None:
    # `python -m gatedconv._build` is a program of its own, which make calls.
    modules = [(path, name) for path, name in python_modules() if layer_of(name) != "cli"]
    modules = [(path, name) for path, name in modules if name != "gatedconv._build"]
    assert len(modules) > 20
    found = [f"{name}:{line}" for path, name in modules for line in prints(path.read_text())]
    assert not found, found


@pytest.mark.parametrize(
    "source", ["print(1)", "write = print", "import sys\nsys.stderr.write('a')", "from sys import stdout"]
)
def test_printing_is_found(source: str) -> None:
    assert prints(source) and not prints("import sys\nsys.exit(0)\nprinted = 1")
