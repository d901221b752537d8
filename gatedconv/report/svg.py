"""Charts as SVG text for self-contained pages: labels on hover, and no plotting package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from gatedconv.report.plots import DENSE, GATED, GRID, MUTED, POLAR

OPEN = (11, 93, 86)
SHAPES = {
    "dense": ("circle", DENSE),
    "compact": ("circle", GATED),
    "dynamic": ("ring", GATED),
    "dense teacher": ("ring", DENSE),
    "control: equal MACs": ("diamond", POLAR),
    "control: fixed at epoch 0": ("square", "#7c3aed"),
}
OTHER = ("diamond", DENSE)
_NAME_HEIGHT, _NAME_WIDTH = 10, 5.0  # of a line and of a letter, in units of the picture


class Point(NamedTuple):
    """A network in a scatter plot: its kind determines the mark; its name is next to it, its label appears on hover."""

    x: float
    y: float
    kind: str
    label: str
    name: str = ""


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """A scatter plot; a note where there are no points."""
    good = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not good:
        return f'<p class="absent">No run has both {escape(x_title)} and {escape(y_title)}.</p>'
    width, height = 520, 330
    left, right, top, bottom = 58, width - 16, 14, height - 46
    xs, ys = _ticks([0.0, *(point.x for point in good)]), _ticks([point.y for point in good])

    def at(point: Point) -> tuple[float, float]:
        return (
            left + (point.x - xs[0]) / (xs[-1] - xs[0]) * (right - left),
            bottom - (point.y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top),
        )

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_title)} against {escape(x_title)}">'
    ]
    for tick in ys:
        _, y = at(Point(xs[0], tick, "", ""))
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, y + 4, _number(tick), "end"))
    for tick in xs:
        x, _ = at(Point(tick, ys[0], "", ""))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="{MUTED}"/>')
        parts.append(_text(x, bottom + 18, _number(tick), "middle"))
    parts.append(_text((left + right) / 2, height - 8, x_title, "middle"))
    parts.append(f'<g transform="translate(14 {(top + bottom) / 2}) rotate(-90)">{_text(0, 0, y_title, "middle")}</g>')
    for point in good:
        parts.append(_mark(*at(point), point))
    parts += _names([(*at(point), point.name) for point in good if point.name], right)
    return "".join(parts) + "</svg>"


def _names(places: Sequence[tuple[float, float, str]], right: float) -> list[str]:
    """Names next to their points, within the picture; overlapping names move down."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for x, y, name in sorted(places, key=lambda place: place[1]):
        width = _NAME_WIDTH * len(name)
        begin = x + 8 if x + 8 + width <= right + 12 else x - 8 - width
        line = y + 3.0
        for low, high, other in sorted(taken, key=lambda place: place[2]):
            if begin < high and low < begin + width and abs(line - other) < _NAME_HEIGHT:
                line = other + _NAME_HEIGHT
        taken.append((begin, begin + width, line))
        parts.append(_text(begin, line, name, "start", size=9))
    return parts


def legend(kinds: Sequence[str]) -> str:
    """The legend of some kinds of networks."""
    items = []
    for kind in kinds:
        mark = _mark(8, 8, Point(0, 0, kind, kind))
        items.append(f'<span><svg class="key" viewBox="0 0 16 16">{mark}</svg>{escape(kind)}</span>')
    return f'<p class="legend">{"".join(items)}</p>'


def heat_map(rates: Mapping[str, Sequence[float]], epochs: Sequence[int]) -> str:
    """Open rates, 0 to 1, one row for each gate and one column for each epoch; darker is more open."""
    width, label_width, cell = 720, 120, max(4, min(16, 640 // max(1, len(rates))))
    step = (width - label_width - 8) / max(1, len(epochs))
    height = cell * len(rates) + 34
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="open rate of every gate over the epochs">']
    every = max(1, -(-10 // cell))
    for row, (name, values) in enumerate(rates.items()):
        y = row * cell
        if row % every == 0:
            parts.append(
                _text(label_width - 6, y + cell - 1, name.removesuffix("_gate"), "end", size=min(10, cell + 2))
            )
        for column, value in enumerate(values):
            value = value if isinstance(value, (int, float)) else math.nan
            shown = min(1.0, max(0.0, value)) if math.isfinite(value) else None
            tip = f"{name}, epoch {epochs[column]}: {value:.1%} open"
            parts.append(
                f'<rect x="{label_width + column * step:.2f}" y="{y}" width="{step + 0.3:.2f}" height="{cell - 0.6}" '
                f'fill="{_shade(shown)}"><title>{escape(tip)}</title></rect>'
            )
    for column in sorted({0, len(epochs) // 2, len(epochs) - 1}) if epochs else []:
        parts.append(_text(label_width + (column + 0.5) * step, height - 18, str(epochs[column]), "middle"))
    parts.append(_text(label_width + (width - label_width) / 2, height - 4, "epoch", "middle"))
    return "".join(parts) + "</svg>"


def _shade(value: float | None) -> str:
    if value is None:
        return "#fecaca"
    return "#" + "".join(f"{round(241 + (channel - 241) * value):02x}" for channel in OPEN)


def _mark(x: float, y: float, point: Point) -> str:
    shape, color = SHAPES.get(point.kind, OTHER)
    tip = f"<title>{escape(point.label)}</title>"
    if shape == "square":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{color}">{tip}</rect>'
    if shape == "diamond":
        return f'<path d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z" fill="{color}" fill-opacity="0.85">{tip}</path>'
    fill = (
        f'fill="{color}" fill-opacity="0.85"' if shape == "circle" else f'fill="none" stroke="{color}" stroke-width="2"'
    )
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {fill}>{tip}</circle>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{MUTED}">{escape(text)}</text>'
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values, five or so."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}"
