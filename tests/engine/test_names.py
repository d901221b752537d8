"""The operations and activations of a plan have the same names, in the same order, in Python and in C++."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gatedconv.engine.plan_writer import ACTS, MAP_FIELDS, OPS, STEP_FIELDS

CPU = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
SHOWN = {"winograd2": "winograd F(2x2)", "winograd4": "winograd F(4x4)", None: ""}


def block(file: str, begin: str) -> str:
    found = re.search(re.escape(begin) + r".*?\{(.*?)\};", (CPU / file).read_text(), re.S)
    assert found is not None, f"{file} has no {begin}"
    return found[1]


@pytest.mark.parametrize(("kind", "names"), [("Op", OPS), ("Act", ACTS)])
def test_a_number_stands_for_the_same_name_everywhere(kind, names):
    enumerators = re.findall(r"^\s*k(\w+),", block("plan.h", f"enum class {kind} :"), re.M)
    snake = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in enumerators]
    assert snake == ["none" if name is None else name for name in names]
    shown = re.findall(r'"(.*?)"', block("gatedconv_plan.cpp", f"const char* const k{kind}s[]"))
    assert shown == [SHOWN.get(name, name) for name in names]


@pytest.mark.parametrize(("kind", "fields", "some"), [("Map", MAP_FIELDS, "slot"), ("Step", STEP_FIELDS, "weights")])
def test_fields_are_at_the_same_places(kind, fields, some):
    *names, count = re.findall(r"\bk(\w+)", re.sub("//.*", "", block("plan.h", f"enum {kind}Field ")))
    assert count == f"{kind}Fields" and len(names) == len(fields)
    assert names[fields.index(some)].lower() == some
