"""Writes the section on the CUDA engine of docs/performance.md from the committed result files.

``python -m benchmarks.gpu.engine_tables`` writes it, ``--check`` says whether it is up to date. A cell stays blank
until it is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.document import markdown, marks, update
from benchmarks.gpu.engine import BATCHES, NETWORK_PROVIDERS
from benchmarks.gpu.engine_roofline import LAYERS
from benchmarks.gpu.session import ROOT

MARKS = marks("engine", "benchmarks.gpu.engine_tables")
DTYPE = "float16"
COMPILE, FUSED, OURS = "compile reduce-overhead", "cudnn-fused graph", "gatedconv"
# (network, batch) -> times faster than cut torch.compile, than cut cuDNN-fused in a graph
GOALS = {
    ("resnet56 mid-50", 1): (3.0, 1.5),
    ("resnet56 mid-50", 32): (3.0, 1.5),
    ("resnet56 mid-50", 256): (2.0, 1.5),
    ("resnet50 mid-50", 32): (1.2, 1.0),
    ("resnet50 mid-50", 256): (1.2, 1.0),
}
NETWORKS = (
    "resnet56 mid-50",
    "resnet110 mid-50",
    "resnet50 mid-50",
    "resnet18 mid-50",
    "resnet56 dense",
    "resnet50 dense",
)
AFTER_GOAL, OPEN_GOAL = 1.5, 1.0
LAYER_BATCH = 32

Found = dict[tuple[Any, ...], dict[str, Any]]


def engine_section(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of both tables for every device that has rows, or of empty ones."""
    devices: dict[str, Found] = {}
    for result in results:
        for row in result["rows"]:
            if str(row.get("benchmark", "")).startswith("engine "):  # other measurements lie beside ours
                name = f"{result['device']}, torch {result['torch']}, commit {result['commit']}"
                key = tuple(row[field] for field in ("benchmark", "case", "batch", "dtype", "provider"))
                devices.setdefault(name, {})[key] = row
    if not devices:
        return f"**Not measured yet on any GPU.**\n\n{_tables({})}"
    return "\n\n".join(f"**{name}**\n\n{_tables(found)}" for name, found in devices.items())


def _tables(found: Found) -> str:
    return f"{_networks(found)}\n\n{_layers(found)}"


def _networks(found: Found) -> str:
    header = [f"network, {DTYPE}, ms", "batch", *NETWORK_PROVIDERS, f"x {COMPILE} (goal)", f"x {FUSED} (goal)"]
    lines = []
    for case in NETWORKS:
        for batch in BATCHES:
            ms = {p: _ms(found, "engine network", case, batch, p) for p in NETWORK_PROVIDERS}
            goals = GOALS.get((case, batch), (None, None))
            ratios = [_ratio(ms[peer], ms[OURS], goal) for peer, goal in zip((COMPILE, FUSED), goals, strict=True)]
            lines.append([case, str(batch), *(_number(value) for value in ms.values()), *ratios])
    return markdown(header, lines, 2)


def _layers(found: Found) -> str:
    header = [
        f"layer, {DTYPE}, batch {LAYER_BATCH}, ms",
        "cut cudnn",
        "cudnn fused",
        OURS,
        "x fastest peer (goal)",
        "roofline",
    ]
    lines = []
    for layer in LAYERS:
        ms = {p: _ms(found, "engine layer", layer.name, LAYER_BATCH, p) for p in ("cut cudnn", "cudnn fused", OURS)}
        peers = [value for name, value in ms.items() if name != OURS and value is not None]
        goal = AFTER_GOAL if layer.scatters else OPEN_GOAL
        row = found.get(("engine layer", layer.name, LAYER_BATCH, DTYPE, OURS), {})
        share = "" if row.get("ratio") is None else f"{100 * row['ratio']:.0f} %"
        ratio = _ratio(min(peers, default=None), ms[OURS], goal)
        lines.append([layer.name, *(_number(value) for value in ms.values()), ratio, share])
    return markdown(header, lines, 1)


def _ms(found: Found, benchmark: str, case: str, batch: int, provider: str) -> float | None:
    value = found.get((benchmark, case, batch, DTYPE, provider), {}).get("ms_median")
    return None if value is None else float(value)


def _ratio(slow: float | None, fast: float | None, goal: float | None) -> str:
    if slow is None or fast is None:
        return "" if goal is None else f"({goal})"
    if goal is None:
        return f"{slow / fast:.2f}"
    return f"{slow / fast:.2f} ({goal}, {'met' if slow / fast >= goal else 'missed'})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main(arguments: list[str]) -> int:
    """Write the section; with --check write nothing and return 1 if the document is out of date."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*-*.json"))
    section = engine_section(json.loads(path.read_text()) for path in paths)
    return update(MARKS, section, check="--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
