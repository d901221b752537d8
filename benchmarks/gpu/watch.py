"""Watches a stage, which runs in a process of its own: ends it in time, and prints what it measured, last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.session import ROOT, Row, Session, table

KILL_S = 510.0  # eight and a half minutes


class Outcome(NamedTuple):
    """How a stage ended: rows, cases there was no time for, exit code of its process, whether it was ended."""

    rows: list[Row]
    skipped: int
    code: int
    late: bool


def watch(command: Sequence[str], session: Session, baseline: str, kill_s: float = KILL_S) -> int:
    """Run a stage, print its table, and return 0 where every case that was begun gave a row that is no failure."""
    outcome = _run(command, session, kill_s)
    print(table(outcome.rows, baseline) if outcome.rows else "no rows")
    if outcome.skipped:
        print(f"{outcome.skipped} cases were not begun: out of time")
    if outcome.late:
        print(f"ended after {kill_s:.0f} s")
        return 124
    failed = sum(row.failed for row in outcome.rows)
    if failed:
        print(f"{failed} of {len(outcome.rows)} rows failed")
    return outcome.code or int(bool(failed) or not outcome.rows)


def _run(command: Sequence[str], session: Session, kill_s: float) -> Outcome:
    assert session.progress is not None
    session.progress.unlink(missing_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    late = False
    try:
        code = process.wait(kill_s)
    except subprocess.TimeoutExpired:
        late, code = True, 124
    finally:  # also where the watcher itself is interrupted
        end(process)
    rows, begun, skipped = _read(session.progress)
    if begun is not None:  # what was going on when it ended
        seconds = time.monotonic() - started
        why = f"cut off after {seconds:.0f} s" if late else f"the process ended with code {code}"
        row = Row(*begun, note=f"failed: {why}")
        session.add(row)
        rows.append(row)
    return Outcome(rows, skipped, code, late)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that began a session of its own, and all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _read(progress: Path) -> tuple[list[Row], list[Any] | None, int]:
    rows: list[Row] = []
    begun: list[Any] | None = None
    skipped = 0
    lines = progress.read_text().splitlines() if progress.exists() else []
    for line in lines:
        try:
            kind, what = json.loads(line)
        except ValueError:  # the last line, half written
            continue
        if kind == "begin":
            begun = what
        elif kind == "row":
            rows.append(Row(**what))
            begun = None
        else:
            skipped += 1
    return rows, begun, skipped
