"""Writes the measured parts of README.md and docs/ from results/ and benchmarks/results/.

``python docs/write.py`` writes them, ``--check`` reports whether they are up to date. No number there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # reproduce/ and benchmarks/ are not installed

from benchmarks import bf16, busy, kernels, runtime_speed, scaling, shipped  # noqa: E402
from benchmarks.gpu import section as gpu_section  # noqa: E402
from gatedconv.report.footprint_table import footprint_rows  # noqa: E402
from gatedconv.report.tables import comparison_table, markdown_table  # noqa: E402
from gatedconv.train.config import read_toml  # noqa: E402
from reproduce.ledger import read_ledger  # noqa: E402
from reproduce.result_tables import interval_text, mean_spread, replace_block, results_text  # noqa: E402
from reproduce.rows import present_recipes  # noqa: E402

RESULTS = ROOT / "results"


def demo() -> str:
    """The table that ``make demo`` ends with, without what the machine has no counter for."""
    summary = _summary("demo")
    for part in (summary, summary["dense"], summary["frozen"]):
        for name in [name for name, value in part.items() if name.startswith("energy_j") and value is None]:
            del part[name]
    return f"```\n{comparison_table(summary)}\n```"


def speed() -> str:
    """How fast the engine is on CPUs, and our convolution on a GPU."""
    return "\n\n".join(filter(None, (shipped.headline(), gpu_section.headline())))


def demo_seeds() -> str:
    """The demo over several seeds, one row each."""
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
    return _markdown(["gates", "seed", "dense top-1 (%)", "compact top-1 (%)", "MACs left", "agreement"], rows)


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
    """The fine-tuning example: gated and compact, the same without gates, and without pretrained weights."""
    rows = []
    for name, what in (
        ("gated", "pretrained, gated, compact"),
        ("dense", "pretrained, no gates"),
        ("scratch", "from scratch, no gates"),
    ):
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


def quantize() -> str:
    """A compact network in float32 and in int8: top-1 and times."""
    path = RESULTS / "quantize.json"
    if not path.is_file():
        return "Not measured yet."
    found = json.loads(path.read_text())
    rows = [
        [
            row["runtime"],
            f"{row['top1']:.2f}",
            f"{row['same_top1']:.2f}",
            f"{row['error']:.1e}",
            f"{row['ms_1']:.3f}",
            f"{row['ms_32']:.2f}",
        ]
        for row in found["rows"]
    ]
    header = ["runtime", "top-1 (%)", "same top-1 (%)", "error", "batch 1 (ms)", "batch 32 (ms)"]
    return f"{found['what']}\n\n{markdown_table(header, rows, 1)}"


def experiments() -> str:
    """The experiment table from the ledger."""
    images = [path.name for path in (ROOT / "docs" / "images").glob("*.png")]
    return results_text(read_ledger(RESULTS / "ledger.jsonl"), present_recipes(), images)


def recipe_search() -> str:
    """The runs that the recipe was chosen from.

    A row may have `settings`, its config fields that differ from those that the file gives for all rows, and `commit`.
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
    header = ["run", "settings", "seed", "evaluated on", "top-1 (%)", "MACs left", "agreement", "commit"]
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    table = _markdown([header[c] for c in used], [[row[c] for c in used] for row in rows])
    common = found.get("settings")
    return f"{table}\n\nCommon settings of the rows with settings: {_settings(common)}." if common else table


ARMS = {  # of results/method-arms.jsonl, in the order of their table
    "recipe": "the recipe",
    "even": "the same share of every gate",
    "measured": "removed by measured loss",
    "shared": "shared weights, the whole network teaches",
    "shared-reopening": "the same, and closed gates may reopen",
    "pull": "weights behind gates shrink before these close",
    "fade": "outputs of gates shrink before these close",
    "earlier": "last gate closed at 28 % of the run",
    "later": "last gate closed at 68 % of the run",
}
BENCHES = {"fast": "`fast-c10`", "small": "ResNet-20, 16x16, no teacher"}


def method_arms() -> str:
    """The variants of the method, each against the recipe by seed."""
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in (RESULTS / "method-arms.jsonl").read_text().splitlines():
        row = json.loads(line)
        runs.setdefault((row["bench"], row["arm"]), {})[row["seed"]] = row
    rows = []
    for bench, arm in ((bench, arm) for bench in BENCHES for arm in ARMS if (bench, arm) in runs):
        found, recipe = runs[bench, arm], runs[bench, "recipe"]
        ahead = [found[seed]["top1"] - recipe[seed]["top1"] for seed in sorted(found.keys() & recipe.keys())]
        mean, spread = mean_spread([row["top1"] for row in found.values()])
        commits = sorted({f"`{row['commit'][:7]}`" for row in found.values()})
        rows.append(
            [
                BENCHES[bench],
                ARMS[arm],
                f"{mean:.2f}" + (f" ± {spread:.2f}" if spread is not None else ""),
                f"{fmean(row['macs_share'] for row in found.values()):.1%}",
                f"{fmean(row['train_macs'] for row in found.values()) / 1e12:.1f}",
                ", ".join(commits),
                interval_text(ahead) if arm != "recipe" and ahead else "",
            ]
        )
    header = ["bench", "variant", "held-out top-1 (%)", "MACs left", "training (TMACs)", "commit"]
    header.append("minus the recipe, paired by seed [95 %]")
    return markdown_table(header, rows, 2)


def footprints() -> str:
    """Size, memory and times of a network in each runtime."""
    path = ROOT / "benchmarks" / "results" / "footprint.json"
    if not path.is_file():
        return "Not measured yet."
    found = json.loads(path.read_text())
    header, cells = footprint_rows(found["rows"])
    rows = [[row["network"], *line] for row, line in zip(found["rows"], cells, strict=True)]
    table = markdown_table(["network", *header], rows, 3)
    return f"{table}\n\nThe least of {found['rounds']} processes of each; commit {_commit(found['machine']['commit'])}."


def training_speed() -> str:
    """Our training loop compared with a plain one on the CPU."""
    path = ROOT / "benchmarks" / "results" / "training-cpu.json"
    found = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    rows = [
        [
            row["network"],
            str(row["batch"]),
            row["dtype"],
            f"{row['plain_ms']:.1f}",
            f"{row['ours_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['ungated_ratio']:.2f}" if "ungated_ratio" in row else "",
            f"{row['roofline']:.0%}",
        ]
        for row in found["rows"]
    ]
    header = [
        "network",
        "batch",
        "dtype",
        "plain loop (ms)",
        "ours (ms)",
        "ours / plain",
        "ours / plain without gates",
        "share of the roofline",
    ]
    return f"{found.get('what', '')}\n\n{_markdown(header, rows)}"


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"demo": demo, "speed": speed},
    ROOT / "docs" / "finetune.md": {"finetune": finetune},
    ROOT / "docs" / "quantize.md": {"quantize": quantize},
    ROOT / "docs" / "scaling.md": scaling.SECTIONS,
    ROOT / "docs" / "performance.md": {
        "kernels": kernels.section,
        "bf16": bf16.section,
        "footprint": footprints,
        "runtime": runtime_speed.section,
        "shipped": shipped.section,
        "busy": busy.section,
        "gpu": gpu_section.section,
    },
    ROOT / "docs" / "results.md": {
        "demo": demo,
        "demo-seeds": demo_seeds,
        "cifar10": cifar10,
        "recipe-search": recipe_search,
        "method-arms": method_arms,
        "experiments": experiments,
        "training-speed": training_speed,
    },
}


def written(path: Path) -> str:
    """The text of a document with every block made again."""
    text = path.read_text(encoding="utf-8")
    for name, make in BLOCKS[path].items():
        text = replace_block(path, name, make(), text)
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
    return markdown_table(header, rows) if rows else "Not run yet."


def main() -> int:
    """Write, or check, every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    check = parser.parse_args().check
    stale = [path for path in BLOCKS if written(path) != path.read_text()]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} does not match the results: run python docs/write.py", file=sys.stderr)
        else:
            path.write_text(written(path))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
