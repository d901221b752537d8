"""One run of a stage: its time limit, the rows it measures, the file and the table that they end in."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 460  # after which a stage begins nothing new; the watchdog ends it at watch.KILL_S
KEY = ("benchmark", "case", "batch", "dtype", "provider")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        benchmark: the family of cases, such as "gate".
        case: what is measured.
        batch: images.
        dtype: of the activations.
        provider: "gatedconv", or a peer by name.
        ms_median: milliseconds per call, median; None where the case did not run, which ``note`` explains.
        ms_min: the fastest.
        ms_iqr: 75th minus 25th percentile.
        launches: kernels per call; None where they were not counted.
        bytes_peak: memory of a call beyond what was held before it; None where it was not measured.
        note: why something is missing; begins with "failed" where it should be there.
    """

    benchmark: str
    case: str
    batch: int
    dtype: str
    provider: str
    ms_median: float | None = None
    ms_min: float | None = None
    ms_iqr: float | None = None
    launches: int | None = None
    bytes_peak: int | None = None
    note: str | None = None
    # Fields of the CPU benchmarks' rows, so that all result files read alike.
    setting: str = ""
    rounds: int | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: float | None = None

    @property
    def failed(self) -> bool:
        """Whether something is missing that should be there."""
        return (self.note or "").startswith("failed")


class Session:
    """Keeps what is measured on the disk from the first row on, so that a run that is cut off loses nothing.

    Args:
        device: short name of the GPU, such as "h200".
        versions: of "torch", "triton" and "cuda".
        folder: where result files lie.
        limit_s: seconds after which nothing new begins.
        progress: a file that gets a line as a case begins, ends or is left out; for whoever watches.
        dry: walk through everything on a CPU, with the smallest cases.
        copies: folders that get the result file, too.
    """

    def __init__(
        self,
        device: str,
        versions: dict[str, str],
        folder: Path = ROOT / "benchmarks" / "results",
        limit_s: float = LIMIT_S,
        progress: Path | None = None,
        dry: bool = False,
        copies: Sequence[Path] = (),
    ) -> None:
        self.started = time.monotonic()
        self.limit_s, self.device, self.progress, self.dry = limit_s, device, progress, dry
        self.header = {
            "device": device,
            **dict.fromkeys(("cpu", "isa", "threads")),
            **versions,
            "versions": {},
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        }
        name = f"{device}-{versions['torch']}-{self.header['commit']}".replace("+", "-")
        self.path, *self.copies = (place / f"{name}.json" for place in (folder, *copies))
        self.rows: list[Row] = []

    @property
    def left_s(self) -> float:
        """Seconds left to the stage."""
        return self.limit_s - (time.monotonic() - self.started)

    def has(self, seconds: float) -> bool:
        """Whether something that takes this long may still be begun."""
        return self.left_s > seconds

    def keep(self, key: Sequence[Any]) -> bool:
        """Take over what an earlier run of this commit measured on this device; False if it measured nothing."""
        kept = [] if not self.path.exists() else json.loads(self.path.read_text())["rows"]
        for old in kept:
            if [old[field] for field in KEY] == list(key) and old["ms_median"] is not None:
                self.rows.append(Row(**old))
                self._tell("row", old)
                return True
        return False

    def begin(self, key: Sequence[Any]) -> None:
        """Note that a case begins: what the process dies of, it dies of in this one."""
        self._tell("begin", list(key))

    def skip(self, key: Sequence[Any]) -> None:
        """Note that there is no time for a case."""
        self._tell("skip", list(key))

    def add(self, row: Row) -> None:
        """Keep a row, in place of an earlier one of the same key. The file is whole at every moment."""
        self.rows.append(row)
        kept = [] if not self.path.exists() else json.loads(self.path.read_text())["rows"]
        new = asdict(row)
        kept = [old for old in kept if any(old[field] != new[field] for field in KEY)]
        text = json.dumps({**self.header, "rows": [*kept, new], "failures": []}, indent=1) + "\n"
        for path in (self.path, *self.copies):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(".tmp")
            whole.write_text(text)
            os.replace(whole, path)
        self._tell("row", new)

    def _tell(self, kind: str, what: Any) -> None:
        if self.progress is not None:
            with self.progress.open("a") as file:
                file.write(json.dumps([kind, what]) + "\n")


def table(rows: Sequence[Row], baseline: str) -> str:
    """Rows as text: a line each, and how much faster than ``baseline`` it is."""
    base = {_case(row): row.ms_median for row in rows if row.provider == baseline}
    lines = [("case", "batch", "dtype", "provider", "ms", "iqr", f"x {baseline}", "launches", "MB", "")]
    for row in rows:
        reference = base.get(_case(row))
        speed = reference / row.ms_median if reference and row.ms_median else None
        lines.append(
            (
                row.case,
                str(row.batch),
                row.dtype,
                row.provider,
                _number(row.ms_median, 3),
                _number(row.ms_iqr, 3),
                _number(speed, 2),
                "" if row.launches is None else str(row.launches),
                _number(None if row.bytes_peak is None else row.bytes_peak / 2**20, 1),
                row.note or "",
            )
        )
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equal length as aligned text, the first underlined."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def text_of(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def commit() -> str:
    """The first 8 digits of the checkout's commit; outside a checkout those of GATEDCONV_COMMIT, or "unknown"."""
    command = ["git", "rev-parse", "--short=8", "HEAD"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GATEDCONV_COMMIT", "")[:8] or "unknown"
    return result.stdout.strip()


def short_name(device: str) -> str:
    """NVIDIA H200 -> h200, NVIDIA GeForce RTX 4090 -> rtx-4090, Tesla T4 -> t4."""
    words = [word for word in re.split(r"[^a-z0-9]+", device.lower()) if word not in ("nvidia", "geforce", "tesla", "")]
    return "-".join(words[:2] if words[:1] in (["rtx"], ["gtx"]) else words[:1]) or "gpu"


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, field) for field in KEY if field != "provider")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
