"""`python -m benchmarks.gpu [first] [--max-minutes X] [--dry] [--out DIR]`: parity and timings on a GPU.

``first`` takes at most six minutes; without it all cases run. Each case runs in a process of its own and is killed at
its time limit; the next one runs whatever happened. What measures no times runs side by side. Rows go to DIR/gpu.json
after every case, output to DIR/logs/.
``--dry`` walks through the smallest case of each kind on the CPU, in one process.

Exit code 0; 1 where a case failed; 2, with one line, for a wrong argument, without a GPU, or where gatedconv is not
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.cases import Case, all_cases, stand_in
from benchmarks.gpu.section import speed
from benchmarks.harness import ROOT, Machine, machine_header, write_result
from gatedconv import _native
from gatedconv._io import first_line, write_atomic
from gatedconv.bench.comparison import Row
from gatedconv.cli import Parser
from gatedconv.report.tables import text_table

FIRST_MINUTES = 6.0
MOST_AT_ONCE = 8  # processes that share the GPU: each has a context of its own there
KILLED = -1
RUNNING: set[subprocess.Popen[bytes]] = set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; see the module."""
    parser = Parser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=("first", "all"), default="all", help="which cases [all]")
    parser.add_argument("--max-minutes", type=float, metavar="X", help="start no case after this time [first: 6]")
    parser.add_argument("--dry", action="store_true", help="walk through the smallest cases on the CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"), metavar="DIR")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    try:
        given = parser.parse_args(arguments)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 2
    if importlib.util.find_spec("gatedconv.kernels") is None:  # setup.py maps kernels/ into the package
        print("gpu: gatedconv is not installed: pip install -e .", file=sys.stderr)
        return 2
    out: Path = given.out.absolute()
    cases = {case.name: case for case in all_cases()}
    if given.case is not None:
        return child(cases[given.case], out)
    if given.dry:
        return dry_walk([case for case in cases.values() if case.dry])
    if not torch.cuda.is_available():
        print("gpu: no CUDA device is visible (--dry does without)", file=sys.stderr)
        return 2
    chosen = [case for case in cases.values() if case.first or given.stage == "all"]
    limit = FIRST_MINUTES if given.stage == "first" else None
    minutes = min(filter(None, (given.max_minutes, limit)), default=None)
    return run_all(chosen, out, None if minutes is None else time.monotonic() + 60 * minutes)


def run_all(cases: Sequence[Case], out: Path, deadline: float | None) -> int:
    """Run each case in its own process; rows are on the disk after every one."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []

    def run(case: Case) -> list[Row]:
        left = case.seconds if deadline is None else min(case.seconds, deadline - time.monotonic())
        if left < min(5.0, case.seconds):
            return [failure(case, "not run: out of time")]
        command = [sys.executable, "-m", "benchmarks.gpu", "--case", case.name, "--out", str(out)]
        return run_case(case, command, out, left)

    for alone, group in itertools.groupby(cases, key=lambda case: case.alone):
        with ThreadPoolExecutor(max(1, min(MOST_AT_ONCE, (os.cpu_count() or 1) // 2))) as pool:
            try:
                for new in map(run, group) if alone else pool.map(run, group):
                    rows += new
                    print(table(new), flush=True)
                    save(out, rows)
            except BaseException:  # an interrupt does not reach the threads, nor the processes that they wait for
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(RUNNING):
                    kill(process)
                raise
    failed = [row for row in rows if row.failed]
    print(f"{len(rows)} rows, {len(failed)} failed, in {out / 'gpu.json'}")
    return int(bool(failed))


def run_case(case: Case, command: Sequence[str], out: Path, seconds: float) -> list[Row]:
    """The rows of a case that runs in a process, and a failed row where it was killed or ended otherwise."""
    result, log = out / f".{case.name}.json", out / "logs" / f"{case.name}.log"
    result.unlink(missing_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        RUNNING.add(process)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = KILLED
        finally:  # also where this process is interrupted
            kill(process)
            RUNNING.discard(process)
    rows: list[Row] = []
    if result.is_file():
        rows = [Row(**row) for row in json.loads(result.read_text())]
        result.unlink()
        if code == 0:
            return rows
    why = f"killed after {seconds:.0f} s" if code == KILLED else f"exit code {code}: {last_line(log)}"
    return [*rows, failure(case, f"failed: {why}")]


def child(case: Case, out: Path) -> int:
    """Run one case in this process and write its rows, after each part."""
    _native.load("cuda")  # the operators exist once it is loaded
    rows: list[Row] = []
    for new in attempts(case, Machine()):
        rows += new
        write_atomic(out / f".{case.name}.json", json.dumps([row.as_dict() for row in rows]).encode())
    return 0


def dry_walk(cases: Sequence[Case]) -> int:
    """Run the cases on the CPU and print their rows; nothing is kept."""
    machine, rows = Machine(dry=True), list[Row]()
    with stand_in(machine) as installed:
        machine.stands_in = bool(installed)
        for case in cases:
            new = [row for part in attempts(case, machine) for row in part]
            rows += new
            print(table(new), flush=True)
    failed = sum(row.failed for row in rows)
    print(f"{len(rows)} rows of a dry walk, {failed} failed; the times mean nothing")
    return int(bool(failed))


def attempts(case: Case, machine: Machine) -> Iterator[list[Row]]:
    """The rows of each part of a case; an exception is a failed row, with its traceback in the log."""
    for part in case.parts:
        try:
            yield list(part(machine))
        except Exception as error:  # the other parts do not depend on this one
            traceback.print_exc()
            yield [failure(case, f"failed: {type(error).__name__}: {first_line(error)}"[:200])]


def failure(case: Case, note: str) -> Row:
    """The row of a case without rows of its own."""
    return Row("case", case.name, 0, "", "", note=note)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that started a session of its own, and all processes that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)


def last_line(log: Path) -> str:
    """The last line of a log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def save(out: Path, rows: Sequence[Row]) -> None:
    """Write DIR/gpu.json: the header of this machine, and the rows, whose notes name no folder of its user."""
    hidden = {str(ROOT): "gatedconv", str(Path.home()): "~", tempfile.gettempdir(): "/tmp"}
    # The GPU's name does not need a context.
    machine = machine_header(gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    kept = [replace(row, note=_without(hidden, row.note)).as_dict() for row in rows]
    write_result(out / "gpu.json", {"machine": machine, "rows": kept})


def _without(hidden: Mapping[str, str], note: str | None) -> str | None:
    for folder, name in hidden.items():
        note = note and note.replace(folder, name)
    return note


def table(rows: Sequence[Row]) -> str:
    """Rows as text, with the speed relative to the baseline of their case."""
    lines = []
    for row in rows:
        cells = [row.case, str(row.batch), row.dtype, row.provider, _number(row.ms_median, 4), _number(row.ms_min, 4)]
        cells += [_number(speed(row, rows), 2), _number(row.error, -1), row.note or ""]
        lines.append([row.benchmark, *cells])
    return text_table(["benchmark", "case", "batch", "dtype", "provider", "ms", "least", "x", "error", ""], lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.1e}" if digits < 0 else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
