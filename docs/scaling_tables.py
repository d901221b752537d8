"""The tables of docs/scaling.md, from the files under results/scaling/, which ``benchmarks/scaling.py`` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results" / "scaling"
_ABSENT = "Not run yet."
_NORMS = {"off": "own", "gates": "synchronized"}


def collectives() -> str:
    """Messages and launches of the gates in a step, with what two processes of gloo took for the messages."""
    found = _read("collectives")
    if found is None:
        return _ABSENT
    lines = [
        "| network | norms of gates | messages | their bytes | gradients of gates, bytes | of all, bytes | "
        "gates' share of bytes | launches for gates | of these, for several GPUs | "
        "2 processes: messages (ms) | step (ms) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        own, gradients = _gate_bytes(row), row["gradient_bytes_per_step"]
        together = row["launches_together"]
        lines.append(
            f"| {_named(row)} | {_NORMS[row['sync_norm']]} | {row['messages_per_step']} | "
            f"{row['bytes_per_step']:,} | {row['gate_gradient_bytes_per_step']:,} | {gradients:,} | "
            f"{own / (row['bytes_per_step'] + gradients):.2%} | "
            f"{together - row['launches_without_gates']} of {together} | {together - row['launches_alone']} | "
            f"{row['messages_ms']:.2f} | {row['step_ms']:.1f} |"
        )
    return "\n".join(lines)


def on_paper() -> str:
    """Bytes and messages of the gates in a step on 8 and on 1,024 GPUs, by a ring and by a tree."""
    found = _read("collectives")
    if found is None:
        return _ABSENT
    lines = [
        "| network | norms of gates | GPUs | sent by each GPU for gates, ring (bytes) | of all it sends | "
        "messages x steps of a ring | of a tree |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        for gpus in (8, 1024):
            own = _gate_bytes(row)
            sent = round(2 * (gpus - 1) / gpus * own)
            share = own / (row["bytes_per_step"] + row["gradient_bytes_per_step"])
            ring, tree = 2 * (gpus - 1), 2 * (gpus - 1).bit_length()
            count = row["messages_per_step"]
            lines.append(
                f"| {_named(row)} | {_NORMS[row['sync_norm']]} | {gpus:,} | {sent:,} | {share:.2%} | "
                f"{count} x {ring:,} | {count} x {tree} |"
            )
    return "\n".join(lines)


def skipping() -> str:
    """A training step with half of the gates closed, with and without skipping their blocks."""
    found = _read("skipping")
    if found is None:
        return _ABSENT
    return (
        f"| network | gates closed | batch | speed-up, median of {found['rounds']} rounds | of the least times | "
        "largest difference of a weight |\n|---|---|---|---|---|---|\n"
        f"| {found['model']} | {found['gates_closed']} of {found['gates']} | {found['batch']} | "
        f"{found['ratio_median']:.2f}x | {found['ratio_of_least']:.2f}x | {found['largest_difference']:.1e} |"
    )


def compiled() -> str:
    """Eager against compiled training steps on the CPU."""
    found = _read("compile")
    if found is None:
        return _ABSENT
    lines = ["| network | batch | eager / compiled, median | of the least times |", "|---|---|---|---|"]
    for row in found["rows"]:
        name = f"{row['model']}, {row['gate']} gates"
        lines.append(f"| {name} | {row['batch']} | {row['ratio_median']:.2f} | {row['ratio_of_least']:.2f} |")
    return "\n".join(lines)


def survival() -> str:
    """Kill-and-resume rounds, and the cost of a checkpoint."""
    kills, checkpoint = _read("kills"), _read("checkpoint")
    lines = []
    if kills is not None:
        # Older results have one recipe, without a name.
        recipes = kills.get("recipes", ["layer gates"])
        kind = recipes[0] if len(recipes) == 1 else f"alternating: {'; '.join(recipes)}"
        lines.append(
            f"- {kills['rounds']} runs of ResNet-20 ({kind}; 48 images of 8 x 8, a checkpoint after every step), "
            f"killed {kills['killed_at_a_time']} times at a random moment and "
            f"{kills['killed_in_a_write']} times inside a write: {kills['rounds_with_differences']} ended with any "
            "difference, to the last bit, in weights, optimizer, random numbers, metrics or summary."
        )
    if checkpoint is not None:
        lines.append(
            f"- A checkpoint of {checkpoint['model']} ({checkpoint['bytes'] / 1e6:.1f} MB) took at most "
            f"{checkpoint['write_s']['most']:.2f} s, {checkpoint['share_of_an_epoch']:.3%} of a CPU epoch of CIFAR-10."
        )
    return "\n".join(lines) or _ABSENT


TABLES: dict[str, Callable[[], str]] = {
    "collectives": collectives,
    "on-paper": on_paper,
    "skipping": skipping,
    "compile": compiled,
    "survival": survival,
}


def _named(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['gate']}"


def _gate_bytes(row: dict[str, Any]) -> int:
    """What a step sends for gates: their messages, and the gradients of their parameters."""
    total: int = row["bytes_per_step"] + row["gate_gradient_bytes_per_step"]
    return total


def _read(stage: str) -> dict[str, Any] | None:
    path = RESULTS / f"{stage}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found
