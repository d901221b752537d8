"""Imports go one way.

cli -> bench -> report | train -> engine -> deploy -> convert | models -> nn | measure -> gating -> ops -> kernels.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RANK = {
    "cli": 10,
    "bench": 9,
    "report": 8,
    "train": 8,
    "engine": 7,
    "deploy": 6,
    "convert": 5,
    "models": 5,
    "nn": 4,
    "measure": 4,
    "gating": 3,
    "ops": 2,
    "kernels": 1,
    "data": 0,
}
MAY_READ_DATA = {"train", "cli", "data"}
# Modules at the top of the package, by the layer that they belong to.
TOP = {
    "_build": "ops",
    "_native": "ops",
    "_checks": "ops",
    "_cuda_graph": "ops",
    "environment": "ops",
    "_io": "ops",
    "__main__": "cli",
}


def layer_of(module: str) -> str | None:
    """Return the layer of a dotted module name, None for the package's own face."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return TOP.get(parts[1], parts[1])


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """List (line, dotted name) of every import of gatedconv, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            # `from gatedconv import x` imports the module x where there is one.
            found += [(node.lineno, f"{base}.{alias.name}" if base == "gatedconv" else base) for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "gatedconv"]


def check_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """List the imports of a module that go the wrong way."""
    here, wrong = layer_of(module), []
    for line, name in imported_modules(ast.parse(source), module, is_package):
        there = layer_of(name)
        if there not in RANK:
            if here != "cli":  # which may use the public face, as a user does
                wrong.append(f"{module}:{line} imports {name} from the public face")
        elif there == "data":
            if here not in MAY_READ_DATA:
                wrong.append(f"{module}:{line} imports {name}; only train and cli read data")
        elif there != here and RANK[there] >= RANK[here]:
            wrong.append(f"{module}:{line} imports {name}: {here} may not import {there}")
    return wrong


def python_modules() -> list[tuple[Path, str]]:
    modules = []
    for folder, package in ((ROOT / "gatedconv", "gatedconv"), (ROOT / "kernels", "gatedconv.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            modules.append((path, ".".join([package, *(part for part in parts if part != "__init__")])))
    return modules


def test_every_module_imports_downwards_only():
    modules = [(path, name) for path, name in python_modules() if name != "gatedconv"]
    assert len(modules) > 20
    wrong = [line for path, name in modules for line in check_imports(path.read_text(), name, path.stem == "__init__")]
    assert not wrong, "\n".join(wrong)


def test_every_module_belongs_to_a_layer():
    assert {layer_of(name) for _, name in python_modules() if name != "gatedconv"} <= set(RANK)


@pytest.mark.parametrize(
    "source",
    [
        "from gatedconv.train import loop",
        "from gatedconv import nn",
        "import gatedconv.models.resnet",
        "from ..nn import Conv2d",
        "def f():\n    from gatedconv.deploy import freeze",
        "from gatedconv import Conv2d",
        "from gatedconv.data import load_data",
    ],
)
def test_an_import_upwards_is_found(source):
    assert check_imports(source, "gatedconv.gating.losses")


def test_native_sources_know_nothing_of_the_python_package():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert files
    assert not [path for path in files if "Python.h" in path.read_text() or "pybind" in path.read_text()]
