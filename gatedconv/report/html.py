"""One self-contained HTML page about runs: accuracy, gates, size and latency. It makes no request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import PurePath
from typing import Any

from gatedconv.report.footprint_table import footprint_rows
from gatedconv.report.svg import Point, heat_map, legend, scatter
from gatedconv.report.tables import joules_text, network_name

_ABSENT = "–"
_STYLE = """
:root { --ink: #1f2430; --muted: #6b7280; --line: #e5e7eb; --accent: #0f766e; }
* { box-sizing: border-box } body { margin: 0; color: var(--ink); background: #f8fafc;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px } h1 { font-size: 26px; margin: 0 }
h2 { font-size: 19px; margin: 0 0 12px; overflow-wrap: anywhere } h3 { font-size: 15px; margin: 20px 0 8px }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin-top: 20px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 24px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left } th { color: var(--muted); font-weight: 600; font-size: 13px }
svg { width: 100%; height: auto; display: block } svg.key { width: 16px; display: inline-block; vertical-align: -3px }
.legend span { margin-right: 18px } .legend svg { margin-right: 6px } .absent, .sub { color: var(--muted) }
.problem { border-left: 4px solid #b91c1c; padding: 6px 12px; background: #fef2f2; overflow-wrap: anywhere }
.bar { display: inline-block; width: 90px; height: 9px; background: var(--line); border-radius: 5px; overflow: hidden;
  vertical-align: 0; margin-left: 8px } .bar i { display: block; height: 100%; background: var(--accent) }
details { margin-top: 12px } summary { cursor: pointer; color: var(--muted) } .scroll { overflow-x: auto }
"""


@dataclass(frozen=True)
class RunView:
    """The readable part of a run; `problems` has the reasons for what is missing.

    Attributes:
        name: of the run.
        config: its settings.
        history: one mapping per epoch, with the fields of metrics.jsonl.
        summary: its results, None while it is not finished.
        problems: missing or damaged files.
        footprint: sizes, memory and times of the compact network in each runtime: rows of `footprint.json`.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] | None = None
    problems: Sequence[str] = ()
    footprint: Sequence[Mapping[str, Any]] = ()


def html_page(runs: Sequence[RunView]) -> str:
    """The page, as HTML text.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("html_page: expected at least one run, got none")
    cards = "".join(_run_card(run) for run in runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>gatedconv runs</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>gatedconv runs</h1><p class="sub">{len(runs)} {"run" if len(runs) == 1 else "runs"}; MACs are '
        "multiply-accumulates of one image by fvcore's rules; latency is measured, never inferred: by the engine "
        "where it ran, else in eager mode.</p>"
        f"{_overview(runs)}{cards}</main></body></html>\n"
    )


def _overview(runs: Sequence[RunView]) -> str:
    nets = [(run, kind, net) for run in runs for kind, net in _networks(run)]
    kinds = list(dict.fromkeys(_mark_kind(run, kind) for run, kind, _ in nets))
    by_macs = [
        _point(run, kind, net, net["macs"] / 1e6, "M MACs") for run, kind, net in nets if _is_number(net["macs"])
    ]
    by_time = [_point(run, kind, net, *time) for run, kind, net in nets if (time := _latency(net)) is not None]
    return (
        '<section class="card"><h2>Accuracy against what it costs</h2><div class="pair">'
        f"<div>{scatter(by_macs, 'MACs (M)', 'top-1 (%)')}</div>"
        f"<div>{scatter(by_time, 'latency of one image (ms)', 'top-1 (%)')}</div></div>{legend(kinds)}</section>"
    )


def _run_card(run: RunView) -> str:
    parts = [f"<h2>{escape(run.name)}</h2>"]
    parts += [f'<p class="problem">{escape(problem)}</p>' for problem in run.problems]
    if run.summary is not None:
        parts.append(_figures_table(run, run.summary))
        parts.append(_energy(run.summary))
    gates = [line for line in run.history if line.get("gate_open_rates")]
    if gates:
        names = list(gates[-1]["gate_open_rates"])
        rates = {name: [line["gate_open_rates"].get(name, float("nan")) for line in gates] for name in names}
        parts.append("<h3>Open gates</h3>" + heat_map(rates, [line["epoch"] for line in gates]))
    if run.summary is not None:
        parts.append(_architecture(run.summary))
    parts.append(_footprint(run.footprint))
    parts.append(_details("Configuration", run.config))
    parts.append(_details("Versions and machine", _provenance(run.summary or {})))
    return f'<section class="card">{"".join(parts)}</section>'


def _figures_table(run: RunView, summary: Mapping[str, Any]) -> str:
    nets = _networks(run)
    rows = [
        ("top-1 (%)", lambda net: _shown(net.get("top1"), "{:.2f}")),
        ("MACs (M)", lambda net: _shown(net.get("macs"), "{:.2f}", 1e-6)),
        ("parameters (k)", lambda net: _shown(net.get("params"), "{:.1f}", 1e-3)),
        *(
            (f"latency, batch {batch}{where} (ms)", lambda net, k=key, b=batch: _shown(_of(net, k, b), "{:.3f}"))
            for key, where in (("latency_ms", ""), ("engine_latency_ms", ", engine"))
            for batch in ("1", "32")
            if any(_of(net, key, batch) is not None for _, net in nets)
        ),
        *(
            (f"energy of a call, batch {batch} (J)", lambda net, b=batch: _shown(_of(net, "energy_j", b), "{:.3g}"))
            for batch in ("1", "32")
            if any(_of(net, "energy_j", batch) is not None for _, net in nets)
        ),
        *([("energy of an image (J)", _energy_of_an_image)] if any("energy_j_image" in net for _, net in nets) else []),
    ]
    header = ["", *(escape(_mark_kind(run, kind)) for kind, _ in nets)]
    table = _table([[name, *(cell(net) for _, net in nets)] for name, cell in rows], header)
    agreement = summary.get("agreement")
    known = _is_number(agreement)
    note = f'<p class="sub">Gates and samples agree on {agreement:.2%} of the decisions.</p>' if known else ""
    return table + note


def _table(rows: Iterable[Iterable[str]], header: Iterable[str] = ()) -> str:
    """A table of cells that are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = [head] * bool(head) + ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _energy(summary: Mapping[str, Any]) -> str:
    joules, source = summary.get("energy_j"), summary.get("energy_source") or ""
    if _is_number(joules):
        return f"<p>Energy of the training: <b>{joules_text(joules)} J</b> ({escape(str(source))}).</p>"
    reason = f": {escape(str(summary['energy_reason']))}" if summary.get("energy_reason") else ""
    return f'<p class="sub">Energy: not measurable here{reason}.</p>'


def _energy_of_an_image(net: Mapping[str, Any]) -> str:
    if "energy_j_image" not in net:
        return _ABSENT
    joules = net["energy_j_image"]
    return joules_text(joules) if _is_number(joules) else "not measurable here"


def _architecture(summary: Mapping[str, Any]) -> str:
    listed = summary.get("blocks")
    blocks = [block for block in listed if isinstance(block, Mapping)] if isinstance(listed, Sequence) else []
    if not blocks:
        return (
            '<h3>What was removed</h3><p class="absent">Not recorded block by block.</p>' if "frozen" in summary else ""
        )
    most = max(_macs_of(block) for block in blocks) or 1
    rows = []
    for block in blocks:
        of, macs = block.get("channels"), _macs_of(block)
        channels = ("kept" if block.get("runs") else "removed") if of is None else f"{block.get('open')} of {of}"
        bar = f'<span class="bar"><i style="width:{100 * macs / most:.1f}%"></i></span>'
        ms = _shown(block.get("ms"), "{:.3f}")
        rows.append([escape(str(block.get("block"))), escape(channels), f"{macs / 1e6:.2f}{bar}", ms])
    header = ["block", "open channels", "MACs (M)", "ms, batch 1"]
    return f"<h3>What is left, block by block</h3>{_table(rows, header)}"


def _footprint(footprint: Sequence[Mapping[str, Any]]) -> str:
    if not footprint:
        return ""
    header, rows = footprint_rows(footprint)
    table = _table([map(escape, row) for row in rows], map(escape, header))
    return (
        f"<h3>What you ship</h3>{table}"
        '<p class="sub">Each runtime in processes of its own, the least of some rounds. Package: as installed, without '
        "what it depends on. Memory: the largest of the process up to its first answer, which includes Python and "
        "NumPy. First: import, load and one call.</p>"
    )


def _macs_of(block: Mapping[str, Any]) -> float:
    macs: Any = block.get("macs")
    return float(macs) if _is_number(macs) and macs > 0 else 0.0


def _details(name: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = [(escape(str(key)), escape(str(value))) for key, value in values.items()]
    return f"<details><summary>{name}</summary>{_table(rows)}</details>"


def _provenance(summary: Mapping[str, Any]) -> dict[str, Any]:
    versions = summary.get("versions")
    found = dict(versions) if isinstance(versions, Mapping) else {}
    return found | {key: summary[key] for key in ("commit", "device", "threads", "wall_s") if key in summary}


def _networks(run: RunView) -> list[tuple[str, Mapping[str, Any]]]:
    """Kind and figures of every network in a summary, the dense one first, controls last."""
    found = [(kind, net) for kind, net in (run.summary or {}).items() if _is_network(net)]
    order = ["dense", "frozen", "dynamic"]
    return sorted(found, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))


def _latency(net: Mapping[str, Any]) -> tuple[float, str] | None:
    """Latency of one image and its unit: the engine's, else that of PyTorch's eager mode."""
    for key, unit in (("engine_latency_ms", "ms by the engine"), ("latency_ms", "ms in eager mode")):
        if _is_number(_of(net, key, "1")):
            return _of(net, key, "1"), unit
    return None


def _is_network(value: Any) -> bool:
    return isinstance(value, Mapping) and _is_number(value.get("top1")) and "macs" in value


def _mark_kind(run: RunView, kind: str) -> str:
    """The label of a network; a control, which trains a sub-network from the start, has its own."""
    part = run.config.get("subnetwork")
    if not part:
        return network_name(kind, run.summary or {})
    return "control: equal MACs" if part == "even" else "control: fixed at epoch 0"


def _point(run: RunView, kind: str, net: Mapping[str, Any], x: float, unit: str) -> Point:
    label = f"{run.name}, {_mark_kind(run, kind)}: {net['top1']:.2f} %, {x:.4g} {unit}"
    name = PurePath(run.name).name
    return Point(x, net["top1"], _mark_kind(run, kind), label, name if len(name) <= 30 else name[:29] + "…")


def _of(net: Mapping[str, Any], key: str, batch: str) -> Any:
    values = net.get(key)
    return values.get(batch) if isinstance(values, Mapping) else None


def _shown(value: Any, form: str, scale: float = 1.0) -> str:
    return form.format(value * scale) if _is_number(value) else _ABSENT


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
