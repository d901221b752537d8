"""Writes the sections on gates of docs/performance.md from the committed result files.

``python -m benchmarks.gpu.tables`` writes them, ``--check`` says whether they are up to date. A cell stays
blank until it is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.document import markdown, marks, update
from benchmarks.gpu.gates import GATES, SHAPES
from benchmarks.gpu.session import ROOT
from benchmarks.gpu.training import PROVIDERS

MARKS = marks("gates", "benchmarks.gpu.tables")
BATCH, DTYPE = 256, "float32"
GATE_PROVIDERS = (
    "eager",
    "compile",
    "compile-reduce-overhead",
    "eager-graph",
    "gatedconv",
    "gatedconv-graph",
)
# Goals of one gate: times faster, and launches.
GRAPH_GOAL, COMPILE_GOAL, EAGER_GOAL, LAUNCHES_GOAL = 6.0, 2.0, 3.0, 4
# Goals of a training step under a graph: at most a share of the ungated one, at least times gated eager.
STEP_GOAL, STEP_EAGER_GOAL, MEMORY_GOAL = 1.10, 1.5, 1.05

Found = dict[tuple[Any, ...], dict[str, Any]]


def gate_section(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of both tables for every device that has rows, or of empty ones."""
    devices: dict[str, Found] = {}
    for result in results:
        rows = [row for row in result.get("rows", []) if row.get("benchmark") in ("gate", "training")]
        if not rows:  # of another kind of benchmark
            continue
        name = f"{result['device']}, torch {result['torch']}, Triton {result['triton']}"
        for row in rows:
            key = (row["benchmark"], row["case"], row["batch"], row["dtype"], row["provider"])
            devices.setdefault(f"{name}, commit {result['commit']}", {})[key] = row
    if not devices:
        return f"**Not measured yet on any GPU.**\n\n{_tables({})}"
    return "\n\n".join(f"**{name}**\n\n{_tables(found)}" for name, found in devices.items())


def _tables(found: Found) -> str:
    return f"{_gates(found)}\n\n{_steps(found)}"


def _gates(found: Found) -> str:
    header = ["one gate, ms", *GATE_PROVIDERS, "x eager (goal 3)", "graph x eager (goal 6)"]
    header += ["graph x reduce-overhead (goal 2)", "launches (goal 4)"]
    lines = []
    for kind in GATES:
        for channels, size in SHAPES[:3]:
            case = f"{kind} {channels}x{size}x{size}"
            rows = {p: found.get(("gate", case, BATCH, DTYPE, p), {}) for p in GATE_PROVIDERS}
            ms = {p: row.get("ms_median") for p, row in rows.items()}
            launches = rows["gatedconv"].get("launches")
            lines.append([
                case,
                *(_number(ms[p], 3) for p in GATE_PROVIDERS),
                _at_least(ms["eager"], ms["gatedconv"], EAGER_GOAL),
                _at_least(ms["eager"], ms["gatedconv-graph"], GRAPH_GOAL),
                _at_least(ms["compile-reduce-overhead"], ms["gatedconv-graph"], COMPILE_GOAL),
                "" if launches is None else f"{launches}, {_met(launches <= LAUNCHES_GOAL)}",
            ])  # fmt: skip
    return markdown(header, lines)


def _steps(found: Found) -> str:
    header = ["training step, ms", "batch", *PROVIDERS, "graph / ungated graph (goal 1.10)"]
    header += ["graph x gated eager (goal 1.5)", "memory / ungated (goal 1.05)"]
    lines = []
    for depth in (56, 110):
        for gate in ("layer", "channel"):
            for batch in (128, 256, 1024) if gate == "layer" else (128, 256):
                case = f"resnet{depth} {gate} gates"
                rows = {p: found.get(("training", case, batch, DTYPE, p), {}) for p in PROVIDERS}
                ms = {p: row.get("ms_median") for p, row in rows.items()}
                memory = [rows[p].get("bytes_peak") for p in ("gatedconv", "ungated")]
                lines.append([
                    case,
                    str(batch),
                    *(_number(ms[p], 2) for p in PROVIDERS),
                    _at_most(ms["gatedconv graph"], ms["ungated graph"], STEP_GOAL),
                    _at_least(ms["gated eager"], ms["gatedconv graph"], STEP_EAGER_GOAL),
                    _at_most(*memory, MEMORY_GOAL),
                ])  # fmt: skip
    return markdown(header, lines)


def _at_least(slow: float | None, fast: float | None, goal: float) -> str:
    return "" if slow is None or fast is None else f"{slow / fast:.1f}, {_met(slow / fast >= goal)}"


def _at_most(ours: float | None, theirs: float | None, goal: float) -> str:
    return "" if ours is None or theirs is None else f"{ours / theirs:.2f}, {_met(ours / theirs <= goal)}"


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main(arguments: list[str]) -> int:
    """Write the section; with --check write nothing and return 1 if the document is out of date."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*-*.json"))
    section = gate_section(json.loads(path.read_text()) for path in paths)
    return update(MARKS, section, check="--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
