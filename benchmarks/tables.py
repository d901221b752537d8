"""The measured sections of docs/performance.md, from the committed result files; docs/write.py puts them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.goals import LAYER_GOALS, LAYER_GOALS_FROM_BATCH, goal
from benchmarks.harness import read, result_files
from benchmarks.layers import OPEN, SHAPES
from benchmarks.networks import CASES as NETWORKS
from gatedconv.report.bench import Row, best_rows
from gatedconv.report.layers import ConvCase
from gatedconv.report.runtimes import OURS, UNLIMITED_ISA
from gatedconv.report.tables import markdown_table

_SHORT = {
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "eager": "PyTorch eager",
}
_LIMITED = (
    "The same machine, with all libraries limited to AVX2 (`ATEN_CPU_CAPABILITY`, `ONEDNN_MAX_CPU_ISA`, "
    "`GATEDCONV_ISA`); OpenVINO's convolutions follow oneDNN's variable. ONNX Runtime has no such setting: its figures "
    "are with AVX-512 where the machine has it, without a ratio or goal. Only cases with a goal are measured here."
)


def cpu() -> str:
    """The section of the committed CPU results."""
    return cpu_section([found for path in result_files() if (found := read(path))["cuda"] is None])


def gpu() -> str:
    """The section of the committed GPU results."""
    return gpu_section([found for path in result_files() if (found := read(path))["cuda"] is not None])


def cpu_section(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of all CPU result files, the newest of each device."""
    newest: dict[str, dict[str, Any]] = {}
    for found in sorted(results, key=lambda result: result["date"]):
        newest[found["device"]] = found
    return "\n\n".join(_device(found) for found in newest.values()) or "No results yet."


def gpu_section(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of all GPU result files: every row, and what failed."""
    parts = ["**Not measured yet on any GPU.**"] if not results else []
    for found in results:
        head = f"### {found['device']}\n\ntorch {found['torch']}, Triton {found['triton']}, CUDA {found['cuda']}; "
        parts.append(f"{head}commit `{(found['commit'] or 'unknown')[:10]}`, {found['date'][:10]}.")
        rows = [Row(**row) for row in found["rows"]]
        lines = [
            [
                row.benchmark,
                row.case,
                str(row.batch),
                row.dtype,
                " ".join(filter(None, (row.provider, row.setting))),
                "" if row.ms_median is None else f"{row.ms_median:.4f}",
                "" if row.ms_min is None else f"{row.ms_min:.4f}",
                "" if row.error is None else f"{row.error:.1e}",
                row.note or "",
            ]
            for row in rows
        ]
        header = ["benchmark", "case", "batch", "dtype", "provider", "median (ms)", "least (ms)", "error", "note"]
        parts.append(markdown_table(header, lines))
    return "\n\n".join(parts)


@dataclass
class Judged:
    """Goals of one result file, met or missed."""

    met: int = 0
    missed: list[str] = field(default_factory=list)

    def judge(self, what: str, ratio: float, wanted: float) -> str:
        """Count one; returns "met" or "missed"."""
        if ratio >= wanted:
            self.met += 1
            return "met"
        self.missed.append(f"{what}: {ratio:.2f} of {wanted}")
        return "missed"

    def summary(self) -> str:
        """The number of goals met, and each missed one."""
        count = self.met + len(self.missed)
        if not count:
            return ""
        text = f"**Goals.** {self.met} of {count} met."
        return "\n".join([text + (" Missed:\n" if self.missed else ""), *(f"- {line}" for line in self.missed)]).strip()


def _device(found: dict[str, Any]) -> str:
    judged = Judged()
    rows = [Row(**row) for row in found["rows"]]
    versions = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("onnxruntime", "openvino") if name in found["versions"]
    )
    parts = [
        f"### {found['device']}\n\n{found['cpu']}, {found['isa']}, {found['threads']} threads, float32; "
        f"torch {found['torch']}, {versions}; commit `{found['commit'][:10]}`, {found['date'][:10]}.",
        _LIMITED if found["device"].endswith("-avx2") else "",
        _networks([row for row in rows if row.benchmark == "network"], judged),
        _layers([row for row in rows if row.benchmark == "layer"], judged),
        _error(rows),
        _failures(found["failures"]),
    ]
    parts.insert(2, judged.summary())
    return "\n\n".join(part for part in parts if part)


def _error(rows: list[Row]) -> str:
    own = [row for row in rows if row.provider == OURS]
    if not own:
        return ""
    worst = max(own, key=lambda row: row.error)
    return (
        f"**Exactness.** Largest max|a - b| / max|b| of gatedconv against eager PyTorch: {worst.error:.1e} "
        f"({worst.case}, batch {worst.batch}); 1e-5 is promised."
    )


def _networks(rows: list[Row], judged: Judged) -> str:
    if not rows:
        return ""
    providers = list(dict.fromkeys(row.provider for row in rows if row.provider != OURS))
    best = {(row.case, row.batch, row.provider): row for row in best_rows(rows)}
    lines = []
    for case in NETWORKS:
        group = {p: best.get((case.name, case.batch, p)) for p in (OURS, *providers)}
        if any(group.values()):
            peers = [row for provider in providers if (row := group[provider])]
            times = [_ms(group[provider]) for provider in (OURS, *providers)]
            verdict = _verdict(f"{case.name}, batch {case.batch}", peers, goal(case), judged)
            lines.append([case.name, str(case.batch), *times, *verdict])
    header = [
        "network",
        "batch",
        "**gatedconv**",
        *(_SHORT.get(p, p) for p in providers),
        "fastest peer / ours",
        "goal",
    ]
    return (
        "**Networks.** Median ms per call (interquartile range), each provider at its fastest setting. "
        "The ratio is taken pair by pair within a round against the fastest peer: median (quartiles).\n\n"
        + markdown_table(header, lines, 1)
        + "\n\n"
        + _settings(rows)
    )


def _settings(rows: list[Row]) -> str:
    """How often each setting was the fastest of its provider."""
    wins: dict[tuple[str, str], int] = {(row.provider, row.setting): 0 for row in rows}
    for row in best_rows(rows):
        wins[row.provider, row.setting] += 1
    counts = [f"{_SHORT.get(p, p)} {setting} ({count})" for (p, setting), count in wins.items() if p != OURS]
    return "Settings tried, and in how many cases each was its provider's fastest: " + "; ".join(counts) + "."


def _layers(rows: list[Row], judged: Judged) -> str:
    if not rows:
        return ""
    best = {(row.case, row.batch, row.provider): row for row in best_rows(rows)}
    lines = []
    for shape in SHAPES:
        for batch in dict.fromkeys(row.batch for row in rows):
            cells, seen = [], False
            for share in OPEN:
                case = replace(shape, batch=batch, open=share)
                dense = best.get((case.name, batch, "conv2d"))
                seen = seen or dense is not None
                cells.append(_layer_cell(case, dense, judged))
            if seen:
                lines.append([shape.shape, str(batch), *cells])
    header = [
        "convolution",
        "batch",
        *(f"{share} % open" if share != "odd" else "odd count" for share in OPEN),
    ]
    return (
        "**One convolution.** How many times faster `masked_conv2d` is than `torch.nn.functional.conv2d` "
        "computing all outputs, each in its faster memory format, by the share of outputs that are open; "
        f'"odd count" is just under half. Goals, for the 32x32 networks\' shapes from batch '
        f"{LAYER_GOALS_FROM_BATCH}: {LAYER_GOALS[50]} half open, {LAYER_GOALS[100]} fully open.\n\n"
        + markdown_table(header, lines, 1)
    )


def _layer_cell(case: ConvCase, dense: Row | None, judged: Judged) -> str:
    if dense is None or dense.ratio is None:
        return "-"
    wanted = goal(case)
    if wanted is None:
        return f"{dense.ratio:.2f}"
    return f"{dense.ratio:.2f} ({judged.judge(f'{case.name}, batch {case.batch}', dense.ratio, wanted)})"


def _failures(failures: list[dict[str, Any]]) -> str:
    if not failures:
        return ""
    lines = [f"- {f['case']}, batch {f['batch']}, {f['provider']} ({f['setting']}): {f['reason']}" for f in failures]
    return "**Not measured.**\n\n" + "\n".join(lines)


def _ms(row: Row | None) -> str:
    return "-" if row is None else f"{row.ms_median:.3g} ({row.ms_iqr:.2g})"


def _verdict(what: str, peers: Sequence[Row], wanted: float | None, judged: Judged) -> list[str]:
    """The ratio against the fastest peer that ran on the same instruction set, and the goal with what became of it."""
    rivals = [row for row in peers if not row.setting.endswith(UNLIMITED_ISA)]
    fastest = min(rivals, key=lambda row: row.ms_median, default=None)
    if fastest is None or fastest.ratio is None:
        return ["-", "" if wanted is None else f"{wanted}"]
    spread = f"{fastest.ratio:.2f} ({fastest.ratio_low:.2f}-{fastest.ratio_high:.2f})"
    verdict = "" if wanted is None else f"{wanted}, {judged.judge(what, fastest.ratio, wanted)}"
    return [f"{spread} {_SHORT.get(fastest.provider, fastest.provider)}", verdict]
