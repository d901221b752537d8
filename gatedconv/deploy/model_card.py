"""The text of a model card: what the network is, what was measured, how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatedconv.deploy.export import About

# Key of a run's summary, name in the table, factor, format.
_ROWS = (
    ("top1", "top-1 (%)", 1.0, "{:.2f}"),
    ("macs", "MACs (M)", 1e-6, "{:.2f}"),
    ("params", "parameters (k)", 1e-3, "{:.1f}"),
)
_TIMES = (("latency_ms", "latency, batch {} (ms)"), ("engine_latency_ms", "latency, batch {}, engine (ms)"))

_LOAD = """## How to run it

With [gatedconv](https://pypi.org/project/gatedconv) and PyTorch:

```python
import gatedconv

model = gatedconv.HubModel.from_pretrained("{name}").model
```
"""
_PLAN = """
Without PyTorch, with NumPy and gatedconv-runtime alone:

```python
import gatedconv_runtime as rt
from huggingface_hub import hf_hub_download

net = rt.load(hf_hub_download("{name}", "model.plan"))
y = net(x)  # x: float32 (N, C, H, W)
```
"""


def card_text(name: str, about: About, summary: Mapping[str, Any], size: tuple[int, ...] | None) -> str:
    """Return a card in Markdown.

    Args:
        name: of the repository.
        about: classes and normalization.
        summary: of a run, as in its ``summary.json``: figures of "dense" and "frozen".
        size: (C, H, W) of the images where the repository holds a plan, None where it holds none.
    """
    parts = [f"# {name.split('/')[-1]}\n", "A network whose gates agreed on what to keep, frozen and compacted.\n"]
    if table := _table(summary):
        parts.append(f"## Measured\n\n{table}\n")
    if about.mean is not None or about.classes is not None or size is not None:
        parts.append("## Images\n\n" + _images(about, size))
    parts.append(_LOAD.format(name=name) + (_PLAN.format(name=name) if size is not None else ""))
    return "\n".join(parts)


def _table(summary: Mapping[str, Any]) -> str:
    nets = {kind: summary[kind] for kind in ("dense", "frozen") if isinstance(summary.get(kind), Mapping)}
    rows = []
    for key, title, scale, form in _ROWS:
        if any(key in net for net in nets.values()):
            rows.append([title, *(form.format(scale * net[key]) if key in net else "-" for net in nets.values())])
    for key, title in _TIMES:
        times = [net.get(key) or {} for net in nets.values()]
        for batch in dict.fromkeys(batch for found in times for batch in found):
            rows.append([title.format(batch), *(f"{t[batch]:.3f}" if batch in t else "-" for t in times)])
    if not rows:
        return ""
    lines = [["", *("compact" if kind == "frozen" else kind for kind in nets)], ["---", *["---:"] * len(nets)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    agreement = summary.get("agreement")
    return table + (f"\n\nThe gates agree with {agreement:.2%} of the images' decisions." if agreement else "")


def _images(about: About, size: tuple[int, ...] | None) -> str:
    lines = []
    if size is not None:
        lines.append(f"- Size: {' x '.join(map(str, size))} (channels, height, width).")
    if about.mean is not None and about.std is not None:
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (about.mean, about.std))
        lines.append(f"- Pixels from 0 to 1, minus the mean ({mean}), divided by the deviation ({std}).")
    if about.classes is not None:
        names = ", ".join(about.classes[:20]) + (" and so on" if len(about.classes) > 20 else "")
        lines.append(f"- {len(about.classes)} classes: {names}.")
    return "\n".join(lines) + "\n"
