"""The measurements on GPUs in docs/performance.md, from the committed result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.harness import RESULTS, made_by
from gatedconv.bench.comparison import Row
from gatedconv.report.tables import markdown_table

# The provider that others of the same case are compared with.
BASELINES = {
    "gate": "eager",
    "gated_scale": "eager",
    "engine": "cudnn fused",
    "layer": "dense cudnn",
    "training step": "ungated graph",
}

_TIMES = ("median (ms)", "least (ms)", "IQR (ms)")
_HEADER = ("benchmark", "case", "batch", "dtype", "provider", *_TIMES, "speed", "error", "note")


def section(folder: Path = RESULTS) -> str:
    """Markdown of every file gpu-*.json: each row, with what failed, and what tuners chose among their candidates."""
    parts = []
    for path in sorted(folder.glob("gpu-*.json")):
        found = json.loads(path.read_text())
        machine = found["machine"]
        parts.append(
            f"### {path.stem.removeprefix('gpu-')}\n\ntorch {machine['torch']}, Triton {machine['triton']}, "
            f"CUDA {machine['cuda']}; {made_by(machine)}."
        )
        rows = [Row(**row) for row in found["rows"]]
        shown = [row for row in rows if row.benchmark != "candidate"]
        parts.append(markdown_table(_HEADER, [_cells(row, speed(row, shown)) for row in shown]))
        parts += _chosen([row for row in rows if row.benchmark == "candidate"])
    return "\n\n".join(parts) or "**Not measured yet on any GPU.**"


def headline(folder: Path = RESULTS) -> str:
    """The sentence of README.md on single layers: the range of our convolution's time over that of dense cuDNN."""
    parts = []
    for path in sorted(folder.glob("gpu-*.json")):
        found = json.loads(path.read_text())
        rows = [Row(**row) for row in found["rows"]]
        ours = [row for row in rows if (row.benchmark, row.provider) == ("layer", "gatedconv")]
        slower = [1 / times for row in ours if (times := speed(row, rows)) is not None]
        if slower:
            dtypes = " and ".join(dict.fromkeys(row.dtype for row in ours))
            parts.append(
                f"On a GPU ({found['machine']['device'].upper()}), our own convolution takes {min(slower):.1f} to "
                f"{max(slower):.1f} times as long as cuDNN's dense one on {len(slower)} single layers in {dtypes}, "
                f"and is off by default."
            )
    return "\n".join(parts)


def speed(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast as the baseline of its case, by the least times."""
    key = row.benchmark, row.case, row.batch, BASELINES.get(row.benchmark)
    base = [each.ms_min for each in rows if (each.benchmark, each.case, each.batch, each.provider) == key]
    return base[0] / row.ms_min if base and base[0] and row.ms_min else None


def _cells(row: Row, times: float | None) -> list[str]:
    provider = " ".join(filter(None, (row.provider, row.setting)))
    ms = ["" if each is None else f"{each:.4f}" for each in (row.ms_median, row.ms_min, row.ms_iqr)]
    error = "" if row.error is None else f"{row.error:.1e}"
    return [
        row.benchmark,
        row.case,
        str(row.batch or ""),
        row.dtype,
        provider,
        *ms,
        f"{times:.2f}" if times else "",
        error,
        row.note or "",
    ]


def _chosen(rows: Sequence[Row]) -> list[str]:
    """Choices of the tuner: for runs of layers in one launch with each time, for single layers how often ours won."""
    runs, layers, ours = list[list[str]](), 0, list[str]()
    for _, group in groupby(rows, key=lambda row: (row.case, row.batch, row.setting)):
        candidates = list(group)
        name, _, key = candidates[0].case.partition(": ")
        times = {each.provider: each.ms_median for each in candidates if each.ms_median is not None}
        if key.startswith("run of"):
            times_text = ", ".join(f"{provider} {ms:.3f}" for provider, ms in times.items())
            runs.append([name, " ".join(key.split()[:3]), str(candidates[0].batch), times_text])
        elif any(provider.startswith("gatedconv") for provider in times) and candidates[0].setting == "gatedconv":
            layers += 1
            ours += [each.provider for each in candidates if each.note == "chosen" and "gatedconv" in each.provider]
    parts = []
    if runs:
        parts.append(markdown_table(["network", "layers", "batch", "each candidate (ms)"], runs))
    if layers:
        parts.append(
            f"Single layers, ours against cuDNN's: the tuner measured {layers} and took ours in {len(ours)}; every "
            "candidate's time is in the result file."
        )
    return parts
