"""The tables of docs/scaling.md, from the files under results/scaling/, which ``benchmarks/scaling.py`` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results" / "scaling"
_ABSENT = "Not run yet."


def collectives() -> str:
    """Messages of the gates in a step, with what two processes of gloo took for them."""
    found = _read("collectives")
    if found is None:
        return _ABSENT
    lines = [
        "| network | gates | messages a step | bytes a step | gradients, bytes a step | gates' share of bytes | "
        "2 processes: messages (ms) | step (ms) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        share = row["bytes_per_step"] / (row["bytes_per_step"] + row["gradient_bytes_per_step"])
        lines.append(
            f"| {row['model']}, {row['gate']} | {row['gates']} | {row['messages_per_step']} | "
            f"{row['bytes_per_step']:,} | {row['gradient_bytes_per_step']:,} | {share:.2%} | "
            f"{row['messages_ms']:.2f} | {row['step_ms']:.1f} |"
        )
    return "\n".join(lines)


def on_paper() -> str:
    """What a GPU sends for the gates in a step of 8 and of 1,024, by a ring and by a tree."""
    found = _read("collectives")
    if found is None:
        return _ABSENT
    lines = [
        "| network | GPUs | sent by each GPU, ring (bytes) | steps of a ring | steps of a tree |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        for gpus in (8, 1024):
            sent = round(2 * (gpus - 1) / gpus * row["bytes_per_step"])
            ring, tree = 2 * (gpus - 1), 2 * (gpus - 1).bit_length()
            count = row["messages_per_step"]
            lines.append(
                f"| {row['model']}, {row['gate']} | {gpus:,} | {sent:,} | {count} x {ring:,} | {count} x {tree} |"
            )
    return "\n".join(lines)


def skipping() -> str:
    """A training step with half the gates shut, with and without leaving their blocks out."""
    found = _read("skipping")
    if found is None:
        return _ABSENT
    return (
        f"| network | gates shut | batch | speed-up, median of {found['rounds']} turns | of the least times | "
        "largest difference of a weight |\n|---|---|---|---|---|---|\n"
        f"| {found['model']} | {found['gates_shut']} of {found['gates']} | {found['batch']} | "
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
        lines.append(
            f"- {kills['rounds']} runs, killed {kills['killed_at_a_time']} times at a random moment and "
            f"{kills['killed_in_a_write']} times inside a write: {kills['rounds_with_differences']} ended with any "
            "difference, to the last bit, in weights, optimiser, random numbers, metrics or summary."
        )
    if checkpoint is not None:
        lines.append(
            f"- A checkpoint of {checkpoint['model']} ({checkpoint['bytes'] / 1e6:.1f} MB) took at most "
            f"{checkpoint['write_s']['most']:.2f} s, {checkpoint['share_of_an_epoch']:.3%} of a CPU epoch of CIFAR-10."
        )
    return "\n".join(lines) or _ABSENT


TABLES: dict[str, Callable[[], str]] = {
    "collectives": collectives, "on-paper": on_paper, "skipping": skipping, "compile": compiled, "survival": survival,
}  # fmt: skip


def _read(stage: str) -> dict[str, Any] | None:
    path = RESULTS / f"{stage}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found
