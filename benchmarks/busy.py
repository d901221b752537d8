"""Slowdown of each runtime where something else keeps one core busy: ``python -m benchmarks.busy``.

Interleaved runtimes, each for a fraction of a second on the quiet machine and then with a process that computes on one
core all the time. Figures are means and the 95th percentile of all calls, because the system takes a core away for
milliseconds at a time, which neither a median nor a minimum of short calls shows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, machine_header, made_by, write_result
from benchmarks.networks import NetworkCase
from gatedconv._io import silenced
from gatedconv.bench.exported import Run
from gatedconv.bench.runtimes import OURS, SETTINGS
from gatedconv.measure.latency import wait_until_idle
from gatedconv.report.tables import markdown_table

FILE = RESULTS / "busy.json"
CASES = (
    NetworkCase("resnet56", "mid-50", 1),
    NetworkCase("resnet56", "mid-50", 32),
    NetworkCase("resnet18", "mid-50", 1),
    NetworkCase("resnet18", "mid-50", 8),
)
CANDIDATES = {
    (OURS, "Engine"): OURS,
    ("onnxruntime", "all optimizations"): "ONNX Runtime",
    ("openvino", "latency"): "OpenVINO",
}


class BusyCore:
    """A process that computes on the last core, stopped but for the time in ``running``."""

    def __init__(self) -> None:
        core = max(os.sched_getaffinity(0))
        code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
        self._process = subprocess.Popen([sys.executable, "-c", code])
        self._process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Compute meanwhile."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def call_times(run: Run, seconds: float) -> list[float]:
    """The ms of all calls in some time, at least two."""
    wait_until_idle()
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def measure(case: NetworkCase, rounds: int, seconds: float, threads: int) -> list[dict[str, Any]]:
    """A row for each runtime: mean and 95th percentile of a call in ms, quiet and busy, and their ratios."""
    network, x = case.build()
    settings = [s for s in SETTINGS if (s.provider, s.name) in CANDIDATES and s.missing is None]
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), contextlib.closing(BusyCore()) as core:
        with silenced():
            runs = {CANDIDATES[s.provider, s.name]: s.prepare(network, x, Path(folder), threads) for s in settings}
        for _ in range(rounds):
            for name, run in runs.items():
                times = found.setdefault(name, {"quiet": [], "busy": []})
                times["quiet"] += call_times(run, seconds)
                with core.running():
                    times["busy"] += call_times(run, seconds)
    rows = []
    for name, times in found.items():
        mean = {load: statistics.fmean(values) for load, values in times.items()}
        late = {load: statistics.quantiles(values, n=20, method="inclusive")[-1] for load, values in times.items()}
        row: dict[str, Any] = {"case": case.name, "batch": case.batch, "runtime": name}
        row |= {f"{load}_ms": round(mean[load], 4) for load in mean} | {
            f"{load}_p95": round(late[load], 4) for load in late
        }
        rows.append({**row, "loss": round(mean["busy"] / mean["quiet"], 3), "calls": len(times["busy"])})
    return rows


def section() -> str:
    """The table of docs/performance.md."""
    if not FILE.is_file():
        return "Not measured yet."
    found = json.loads(FILE.read_text())
    machine = found["machine"]
    lines = [
        [row["case"], str(row["batch"]), row["runtime"], *(f"{row[key]:.3f}" for key in _COLUMNS), f"{row['loss']:.2f}"]
        for row in found["rows"]
    ]
    header = ["network", "batch", "runtime", "quiet (ms)", "95 %", "busy (ms)", "95 %", "busy / quiet"]
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads; {made_by(machine)}; "
        f"load average at the start {found['load']:.1f}.\n\n" + markdown_table(header, lines, 3)
    )


_COLUMNS = ("quiet_ms", "quiet_p95", "busy_ms", "busy_p95")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each runtime [10]")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each round, quiet and busy [0.4]")
    parser.add_argument("--threads", type=int, default=2, help="of every runtime [2]")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=FILE, help="result file [benchmarks/results/busy.json]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    for case in CASES:
        if options.only in case.name:
            more = measure(case, options.rounds, options.seconds, options.threads)
            rows += more
            for row in more:
                print(
                    f"{row['case']}, batch {row['batch']}, {row['runtime']}: {row['quiet_ms']:.3f} ms quiet, "
                    f"{row['busy_ms']:.3f} busy, loss {row['loss']:.2f}",
                    flush=True,
                )
    result = {"machine": machine_header(options.threads), "load": load, "rows": rows}
    write_result(options.out, result)


if __name__ == "__main__":
    main()
