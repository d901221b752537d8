"""The measurements on GPUs in docs/performance.md, from the committed result files."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import RESULTS
from gatedconv.report.bench import Row
from gatedconv.report.tables import markdown_table


def section(folder: Path = RESULTS) -> str:
    """Markdown of every row of every file gpu-*.json, with what failed."""
    parts = []
    for path in sorted(folder.glob("gpu-*.json")):
        found = json.loads(path.read_text())
        machine = found["machine"]
        parts.append(
            f"### {machine['device']}\n\ntorch {machine['torch']}, Triton {machine['triton']}, CUDA {machine['cuda']}; "
            f"commit `{(machine['commit'] or 'unknown')[:10]}`, {machine['date'][:10]}."
        )
        rows = [Row(**row) for row in found["rows"]]
        header = ["benchmark", "case", "batch", "dtype", "provider", "median (ms)", "least (ms)", "error", "note"]
        parts.append(markdown_table(header, map(_cells, rows)))
    return "\n\n".join(parts) or "**Not measured yet on any GPU.**"


def _cells(row: Row) -> list[str]:
    provider = " ".join(filter(None, (row.provider, row.setting)))
    times = ["" if ms is None else f"{ms:.4f}" for ms in (row.ms_median, row.ms_min)]
    error = "" if row.error is None else f"{row.error:.1e}"
    return [row.benchmark, row.case, str(row.batch), row.dtype, provider, *times, error, row.note or ""]
