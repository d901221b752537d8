"""Writes the measured parts of README.md and docs/results.md from the runs under results/.

``python docs/write.py`` writes them, ``--check`` says whether they are up to date. No number there is typed
by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_tables import TABLES

from gatedconv.report.tables import comparison_table
from gatedconv.train.config import read_toml
from reproduce.ledger import read_ledger
from reproduce.results import results_text
from reproduce.rows import present_recipes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def demo() -> str:
    """The table that ``make demo`` ends with."""
    return f"```\n{comparison_table(_summary('demo'))}\n```"


def demo_seeds() -> str:
    """The demo over several seeds, one row each: what the table above looks like on other numbers."""
    rows = []
    for path in sorted(RESULTS.glob("demo-seeds/*.json")):
        found = json.loads(path.read_text())
        dense, frozen = found["dense"], found["frozen"]
        rows.append(
            [
                found["gate"],
                str(found["seed"]),
                f"{dense['top1']:.2f}",
                f"{frozen['top1']:.2f}",
                f"{frozen['macs'] / dense['macs']:.1%}",
                f"{found['agreement']:.2%}",
            ]
        )
    return _markdown(["gates", "seed", "dense top-1 (%)", "frozen top-1 (%)", "MACs left", "agreement"], rows)


def cifar10() -> str:
    """The short CIFAR-10 runs, dense and gated with the same seed and recipe."""
    rows = []
    for path in sorted(RESULTS.glob("cifar10-*/summary.json")):
        found = json.loads(path.read_text())
        kind = "dense" if "dense" in found else "frozen"
        net = found[kind]
        config = read_toml(path.with_name("config.toml"))
        gates = "none (dense)" if kind == "dense" else f"{config['gate']}, {config['position']}"
        agreement = "" if kind == "dense" else f"{found['agreement']:.2%}"
        epochs = str(max(found["epochs"].values()))
        rows.append(
            [
                gates,
                str(found["seed"]),
                epochs,
                f"{net['top1']:.2f}",
                f"{net['macs'] / 1e6:.2f}",
                f"{net['params'] / 1e3:.1f}",
                agreement,
                _commit(found["commit"]),
            ]
        )
    header = ["gates", "seed", "epochs", "top-1 (%)", "MACs (M)", "parameters (k)", "agreement", "commit"]
    return _markdown(header, rows)


def finetune() -> str:
    """The fine-tuning example: gated and cut, the same without gates, and without pretrained weights."""
    rows = []
    for name, what in (
        ("gated", "pretrained, gated, cut"), ("dense", "pretrained, no gates"), ("scratch", "from scratch, no gates")
    ):  # fmt: skip
        path = RESULTS / "finetune" / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            share = found["macs"] / found["dense_macs"]
            agreement = f"{found['agreement']:.1%}" if "agreement" in found else "-"
            cells = [
                str(found["arguments"]["epochs"]),
                f"{found['top1']:.1f}",
                f"{found['macs'] / 1e6:.1f} ({share:.0%})",
            ]
            rows.append([what, *cells, f"{found['params'] / 1e6:.2f}", agreement])
    return _markdown(["network", "epochs", "top-1 (%)", "MACs (M)", "parameters (M)", "agreement"], rows)


def experiments() -> str:
    """The experiment table: what the ledger has, and what was not run yet."""
    images = [path.name for path in (ROOT / "docs" / "images").glob("*.png")]
    return results_text(read_ledger(RESULTS / "ledger.jsonl"), present_recipes(), images)


def recipe_search() -> str:
    """The runs that the recipe was chosen by.

    A row may carry `settings`, the fields of its config that differ from those that the file gives for all rows, and
    `commit`, of the source; the first rows do not.
    """
    found = json.loads((RESULTS / "recipe-search.json").read_text())
    rows = [
        [
            row["label"],
            _settings(row.get("settings", {})),
            str(row["seed"]),
            row["evaluated_on"],
            f"{row['top1']:.2f}",
            f"{row['macs_share']:.1%}",
            "" if row["agreement"] is None else f"{row['agreement']:.2%}",
            _commit(row["commit"]) if row.get("commit") else "",
        ]
        for row in found["rows"]
    ]
    header = ["run", "settings", "seed", "judged on", "top-1 (%)", "MACs left", "agreement", "commit"]
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    table = _markdown([header[c] for c in used], [[row[c] for c in used] for row in rows])
    common = found.get("settings")
    return f"{table}\n\nOf all rows that tell their settings: {_settings(common)}." if common else table


def training_speed() -> str:
    """Our training loop beside a plain one on the CPU."""
    path = ROOT / "benchmarks" / "results" / "training-cpu.json"
    found = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    rows = [
        [row["network"], str(row["batch"]), row["dtype"], f"{row['plain_ms']:.1f}", f"{row['ours_ms']:.1f}",
         f"{row['ratio']:.2f}", f"{row['ungated_ratio']:.2f}" if "ungated_ratio" in row else "",
         f"{row['roofline']:.0%}"]
        for row in found["rows"]
    ]  # fmt: skip
    header = [
        "network", "batch", "dtype", "plain loop (ms)", "ours (ms)", "ours / plain", "ours / plain without gates",
        "share of the roofline",
    ]  # fmt: skip
    return f"{found.get('what', '')}\n\n{_markdown(header, rows)}"


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"demo": demo},
    ROOT / "docs" / "finetune.md": {"finetune": finetune},
    ROOT / "docs" / "scaling.md": TABLES,
    ROOT / "docs" / "results.md": {
        "demo": demo,
        "demo-seeds": demo_seeds,
        "cifar10": cifar10,
        "recipe-search": recipe_search,
        "experiments": experiments,
        "training-speed": training_speed,
    },
}


def written(path: Path) -> str:
    """The file's text with every block made anew."""
    text = path.read_text()
    for name, make in BLOCKS[path].items():
        begin, end = f"<!-- {name}: begin, written by docs/write.py -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{path}: no block {begin} ... {end}")
        text = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    return text


def _summary(name: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((RESULTS / name / "summary.json").read_text())
    return summary


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name} = {json.dumps(value)}`" for name, value in settings.items())


def _commit(commit: str) -> str:
    name, _, changes = commit.partition("+")
    return f"`{name[:10]}`" + (" with changes" if changes else "")


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not run yet."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Write, or check, every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    check = parser.parse_args().check
    stale = [path for path in BLOCKS if written(path) != path.read_text()]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} does not match results/: run python docs/write.py", file=sys.stderr)
        else:
            path.write_text(written(path))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
