"""What was executed: instructions and coverage of every kernel, mutations found.

Sessions of the tests add to build/ptx/ledger.json; `python -m tests.ptx.ledger` sums it up in
benchmarks/results/ptx.json, of which docs/write.py makes the table in docs/performance.md. With names of kernels
("conv_kernel f16 sm_90") it prints the lines of csrc/ with instructions that have not run.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gatedconv._io import locked, write_atomic
from tests.ptx.parser import Kernel

ROOT = Path(__file__).parents[2]
SESSIONS = ROOT / "build" / "ptx" / "ledger.json"
RESULTS = ROOT / "benchmarks" / "results" / "ptx.json"


class Ledger:
    """Collects what ran, by kernel and architecture, and mutations by name.

    Attributes:
        kernels: "kernel sm_90" -> the instructions executed, the names of cases, and for every compiled variant its
            digest, and how many of its instructions have run from each line of the sources.
        mutations: Name -> its kind, the kernels that it changes, and what found it, "" for nothing.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, dict[str, Any]] = {}
        self.mutations: dict[str, dict[str, str]] = {}

    def add(self, name: str, architecture: int, variant: str, case: str, kernel: Kernel, ran: np.ndarray, count: int):
        """Record launches of a compiled variant for one case: which instructions ran, and how many in all."""
        row = self.kernels.setdefault(f"{name} sm_{architecture}", {"executed": 0, "cases": [], "variants": {}})
        row["executed"] += count
        row["cases"] = sorted({*row["cases"], case})
        digest = hashlib.sha256("\n".join(one.text for one in kernel.instructions).encode()).hexdigest()[:16]
        lines = [f"{file}:{line}" for file, line in (one.source for one in kernel.instructions)]
        seen = row["variants"].setdefault(variant, {"digest": digest, "ran": "", "lines": lines})
        seen["ran"] = _join(seen["ran"], "".join("01"[int(one)] for one in ran))

    def add_mutation(self, kind: str, kernel: str, name: str, found: str) -> None:
        """Record a mutation, `found` by what, or ""."""
        self.mutations[name] = {"kind": kind, "kernel": kernel, "found": found}

    def save(self, path: Path = SESSIONS) -> None:
        """Add this test run to a file; a kernel there that was compiled from other sources is forgotten."""
        with locked(path.with_suffix(".lock")):
            self._add_to(path)

    def _add_to(self, path: Path) -> None:
        found = json.loads(path.read_text()) if path.exists() else {"kernels": {}, "mutations": {}}
        for key, row in self.kernels.items():
            old = found["kernels"].get(key)
            if old is None or any(
                variant in row["variants"] and row["variants"][variant]["digest"] != seen["digest"]
                for variant, seen in old["variants"].items()
            ):
                found["kernels"][key] = row
                continue
            old["executed"] += row["executed"]
            old["cases"] = sorted({*old["cases"], *row["cases"]})
            for variant, seen in row["variants"].items():
                known = old["variants"].setdefault(variant, seen)
                known["ran"] = _join(known["ran"], seen["ran"])
        found["mutations"].update(self.mutations)
        write_atomic(path, json.dumps(found).encode())


def _join(a: str, b: str) -> str:
    """Which instructions have run in one of two test runs."""
    return "".join(map(max, a, b)) if a else b


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """The rows of the result file."""
    body: dict[str, Any] = {"kernels": {}, "mutations": dict(sorted(runs["mutations"].items()))}
    for key, row in sorted(runs["kernels"].items()):
        ran = "".join(seen["ran"] for seen in row["variants"].values())
        body["kernels"][key] = {
            "cases": len(row["cases"]),
            "variants": len(row["variants"]),
            "executed": row["executed"],
            "instructions": len(ran),
            "covered": ran.count("1"),
        }
    return body


def left_out(row: dict[str, Any]) -> list[str]:
    """A line for each line of the sources with instructions that have not run."""
    of, missing = Counter[str](), Counter[str]()
    for seen in row["variants"].values():
        of.update(seen["lines"])
        missing.update(line for line, ran in zip(seen["lines"], seen["ran"], strict=True) if ran == "0")
    folder = ROOT / "csrc"
    files = {str(path.relative_to(folder)): path.read_text().splitlines() for path in folder.rglob("*.*h")}
    found = []
    for line, count in sorted(missing.items()):
        file, number = line.split(":")
        text = files[file][int(number) - 1].strip() if file in files and number != "0" else ""
        found.append(f"{line:<28} {count:>5} of {of[line]:>5}  {text}")
    return found


def table(body: dict[str, Any]) -> str:
    """The rows as markdown."""
    lines = [
        "| kernel | architecture | cases | compiled variants | instructions executed | covered |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for key, row in body["kernels"].items():
        kernel, _, architecture = key.rpartition(" ")
        share = row["covered"] / row["instructions"]
        lines.append(
            f"| {kernel} | {architecture} | {row['cases']} | {row['variants']} | {row['executed']:,} | {share:.0%} |"
        )
    lines += ["", "| mutations | kernels | tried | found | not found |", "| --- | --- | ---: | ---: | --- |"]
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name, one in body["mutations"].items():
        groups.setdefault((one["kind"], one["kernel"]), {})[name] = one["found"]
    for (kind, kernels), tried in sorted(groups.items()):
        missed = [name for name, found in tried.items() if not found]
        names = "; ".join(missed) if len(missed) <= 4 else f"{len(missed)} that change nothing in these cases"
        lines.append(f"| {kind} | {kernels} | {len(tried)} | {len(tried) - len(missed)} | {names or 'none'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    recorded = json.loads(SESSIONS.read_text())
    for name in sys.argv[1:]:
        print(name, *left_out(recorded["kernels"][name]), sep="\n")
    if not sys.argv[1:]:
        RESULTS.write_text(json.dumps(summary(recorded), indent=1) + "\n")
        print(table(summary(recorded)))
