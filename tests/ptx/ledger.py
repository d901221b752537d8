"""What was executed: instructions and coverage of every kernel, mutations found.

`python -m tests.ptx.ledger` prints benchmarks/results/ptx.json as tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "ptx.json"


class Ledger:
    """Collects rows by (kernel, architecture) and mutations by name."""

    def __init__(self) -> None:
        self.cases: dict[str, set[str]] = {}
        self.executed: dict[str, int] = {}
        self.covered: dict[str, dict[str, np.ndarray]] = {}
        self.mutations: dict[str, dict[str, Any]] = {}

    def add(self, kernel: str, architecture: int, variant: str, case: str, covered: np.ndarray, executed: int) -> None:
        """Record a launch: of which compiled variant, for which case, what ran."""
        key = f"{kernel} sm_{architecture}"
        self.cases.setdefault(key, set()).add(case)
        self.executed[key] = self.executed.get(key, 0) + executed
        seen = self.covered.setdefault(key, {})
        seen[variant] = seen[variant] | covered if variant in seen else covered.copy()

    def add_mutation(self, kind: str, name: str, found: str) -> None:
        """Record a mutation, `found` by what, or ""."""
        self.mutations[name] = {"kind": kind, "found": found}

    def merge_into(self, path: Path) -> None:
        """Write the file; rows and mutations of other sessions stay, those of this one replace theirs."""
        body = json.loads(path.read_text()) if path.exists() else {"kernels": {}, "mutations": {}}
        for key, seen in self.covered.items():
            body["kernels"][key] = {
                "cases": len(self.cases[key]),
                "variants": len(seen),
                "executed": self.executed[key],
                "instructions": sum(one.size for one in seen.values()),
                "covered": int(sum(one.sum() for one in seen.values())),
            }
        body["mutations"].update(self.mutations)
        for part in body:
            body[part] = dict(sorted(body[part].items()))
        path.write_text(json.dumps(body, indent=1) + "\n")


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
    lines += ["", "| mutations | tried | found | not found |", "| --- | ---: | ---: | --- |"]
    kinds = sorted({one["kind"] for one in body["mutations"].values()})
    for kind in kinds:
        of_kind = {name: one for name, one in body["mutations"].items() if one["kind"] == kind}
        missed = [name for name, one in of_kind.items() if not one["found"]]
        names = "; ".join(missed) if len(missed) <= 4 else f"{len(missed)} that change nothing in these cases"
        lines.append(f"| {kind} | {len(of_kind)} | {len(of_kind) - len(missed)} | {names or 'none'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(RESULTS.read_text())))
