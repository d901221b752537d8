"""Results as plain text tables, the same on a terminal, in a log and in a README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]
_ABSENT = "-"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells in columns: the first aligned to the left, the others to the right, with a rule under the header."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def laid_out(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([laid_out(lines[0]), rule, *(laid_out(line) for line in lines[1:])])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None) -> str:
    """Header and rows of equal length as a Markdown table.

    Args:
        header: names of the columns.
        rows: cells as text.
        texts: columns after this many are aligned to the right; None aligns none.
    """
    rule = ["---" if texts is None or column < texts else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def comparison_table(summary: Summary) -> str:
    """Dense against compact, from a run's summary: top-1, MACs, parameters, latency, agreement.

    A run without a dense baseline, or without gates, leaves that column empty.
    """
    dense, frozen = summary.get("dense"), summary.get("frozen")
    rows = [
        ["top-1 (%)", *_cells(dense, frozen, "top1", "{:.2f}", relative=False)],
        ["MACs (M)", *_cells(dense, frozen, "macs", "{:.2f}", scale=1e-6)],
        ["parameters (k)", *_cells(dense, frozen, "params", "{:.1f}", scale=1e-3)],
    ]
    for key, where in (("latency_ms", ""), ("engine_latency_ms", ", engine")):
        for batch in ("1", "32"):
            before, after = (_latency(side, key, batch) for side in (dense, frozen))
            if before or after:
                cells = _cells(before, after, "ms", "{:.2f}")
                rows.append([f"latency, batch {batch}{where} (ms)", *cells])
    for batch in ("1", "32"):
        spent = [((side or {}).get("energy_j") or {}).get(batch) for side in (dense, frozen)]
        if any(joules is not None for joules in spent):
            cells = [_ABSENT if joules is None else joules_text(joules) for joules in spent]
            rows.append([f"energy of a call, batch {batch} (J)", *cells, ""])
    known = [side if side and "energy_j_image" in side else None for side in (dense, frozen)]
    if any(side and side["energy_j_image"] is None for side in known):
        rows.append(["energy of an image (J)", "", joules_text(None), ""])
    elif any(known):
        rows.append(["energy of an image (J)", *_cells(known[0], known[1], "energy_j_image", "{:.3g}")])
    if "energy_j" in summary:
        rows.append(["training energy (J)", "", joules_text(summary["energy_j"]), ""])
    if frozen is not None:
        rows.append(["agreement (%)", _ABSENT, f"{100 * summary['agreement']:.2f}", ""])
    return text_table(["", network_name("dense", summary), network_name("frozen", summary), "change"], rows)


def network_name(kind: str, summary: Summary) -> str:
    """The label of a network in a summary: "frozen" is the compact one, and "dense" may be the teacher of the run."""
    return "compact" if kind == "frozen" else "dense teacher" if kind == "dense" and summary.get("taught") else kind


def joules_text(joules: float | None) -> str:
    """Joules with at least three digits; None is "not measurable here"."""
    return "not measurable here" if joules is None else f"{joules:,.0f}" if joules >= 1000 else f"{joules:.3g}"


def runs_table(summaries: Mapping[str, Summary]) -> str:
    """One row per network of each run: {run: summary}."""
    rows = []
    for run, summary in summaries.items():
        for kind in ("dense", "frozen"):
            if kind in summary:
                agreement = summary.get("agreement") if kind == "frozen" else None
                rows.append(
                    [
                        run,
                        network_name(kind, summary),
                        *_figures(summary[kind]),
                        _ABSENT if agreement is None else f"{100 * agreement:.2f}",
                    ]
                )
    return text_table(["run", "network", "top-1 (%)", "MACs (M)", "params (k)", "agreement (%)"], rows)


def figures_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per network, from {name: {top1, macs, params}}."""
    return text_table(
        ["network", "top-1 (%)", "MACs (M)", "params (k)"], [[name, *_figures(row)] for name, row in rows.items()]
    )


def _figures(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['top1']:.2f}", f"{row['macs'] / 1e6:.2f}", f"{row['params'] / 1e3:.1f}"]


def _latency(side: Mapping[str, Any] | None, key: str, batch: str) -> dict[str, float] | None:
    found = (side or {}).get(key, {}).get(batch)
    return None if found is None else {"ms": found}


def _cells(
    dense: Mapping[str, Any] | None,
    frozen: Mapping[str, Any] | None,
    key: str,
    form: str,
    *,
    scale: float = 1.0,
    relative: bool = True,
) -> list[str]:
    """Dense, frozen and their difference: percent of dense where `relative`, else in the unit itself."""
    values = [None if side is None else side[key] * scale for side in (dense, frozen)]
    shown = [_ABSENT if value is None else form.format(value) for value in values]
    before, after = values
    if before is None or after is None:
        return [*shown, ""]
    return [*shown, f"{100 * (after / before - 1):+.1f} %" if relative else f"{after - before:+.2f}"]
