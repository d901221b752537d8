"""Options, the results file and the closing table of ``pytest benchmarks``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.goals import goal
from benchmarks.harness import Record, default_path, machine_header
from benchmarks.layers import MOST_ROUNDS
from gatedconv.report.bench import Comparison, Row, bench_table, best_rows
from gatedconv.report.runtimes import OURS

CACHE = Path(__file__).resolve().parent.parent / "build" / "bench"
_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gatedconv benchmarks")
    group.addoption(
        "--results",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="keep the rows, and skip what FILE holds already; "
        "without FILE: benchmarks/results/DEVICE-TORCH-COMMIT.json",
    )
    group.addoption("--rounds", type=int, default=15, help="rounds of each case [15]")
    group.addoption("--threads", type=int, default=2, help="CPU threads of every provider [2]")
    group.addoption("--max-minutes", type=float, help="start no case after this time; run again to continue")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: in the short selection that `make bench` runs")
    config.addinivalue_line("markers", "goals: has a goal; what `make bench-all` measures once more, held to AVX2")
    config.stash[_ROWS] = []


def as_parameter(case: Any, name: str, quick: bool) -> Any:
    """A case as a test parameter, with its name, hyphenated, and the marks of the selections that it is in."""
    marks = [pytest.mark.quick] * quick + [pytest.mark.goals] * (goal(case) is not None)
    return pytest.param(case, id=name.replace(" ", "-"), marks=marks)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record | None:
    """The results file, None without --results."""
    threads, wanted = pytestconfig.getoption("--threads"), pytestconfig.getoption("--results")
    if wanted is None:
        return None
    header = machine_header(threads)
    return Record(default_path(header) if wanted == "auto" else Path(wanted), header)


@pytest.fixture(scope="session")
def deadline(pytestconfig: pytest.Config) -> float | None:
    minutes = pytestconfig.getoption("--max-minutes")
    return None if minutes is None else time.monotonic() + 60 * minutes


@pytest.fixture(scope="session")
def cpu_threads(pytestconfig: pytest.Config) -> Iterator[int]:
    before = torch.get_num_threads()
    threads: int = pytestconfig.getoption("--threads")
    torch.set_num_threads(threads)
    yield threads
    torch.set_num_threads(before)


@pytest.fixture
def compete(
    pytestconfig: pytest.Config,
    benchmark: Any,
    record: Record | None,
    deadline: float | None,
    cpu_threads: int,
) -> Callable[[str, Any, Callable[[], Comparison]], None]:
    """(benchmark, case, comparison) -> measure a case, unless the results file has it."""

    def measure(family: str, case: Any, build: Callable[[], Comparison]) -> None:
        if record is not None and record.has(family, case.name, case.batch):
            pytest.skip("measured before")
        if deadline is not None and time.monotonic() > deadline:
            pytest.skip("out of time; run again to continue")
        comparison = build()
        rounds = pytestconfig.getoption("--rounds")
        sample_rounds(benchmark, comparison, min(rounds, MOST_ROUNDS) if family == "layer" else rounds)
        rows, failures = comparison.rows(), failures_of(comparison)
        pytestconfig.stash[_ROWS] += rows
        benchmark.group = f"{case.name}, batch {case.batch}"
        benchmark.extra_info.update(rows=[row.as_dict() for row in rows], failures=failures)
        if record is not None:
            record.add(rows, failures)
        assert rows, failures

    return measure


def sample_rounds(benchmark: Any, comparison: Comparison, rounds: int) -> None:
    """Let pytest-benchmark time the first candidate; the others are sampled in its untimed set-up, round by round."""
    timing = comparison.timing
    first = next(iter(timing.candidates))
    others = [name for name in timing.candidates if name != first]

    def peers() -> None:
        timing.round(others)
        timing.prepare(first)

    with torch.inference_mode():
        benchmark.pedantic(timing.sample, args=(first,), setup=peers, rounds=rounds, iterations=1)
    benchmark.extra_info.update(candidate=": ".join(first), calls_per_round=timing.calls[first])


def failures_of(comparison: Comparison) -> list[dict[str, Any]]:
    """The settings that could not be timed, as JSON types."""
    where = {"benchmark": comparison.benchmark, "case": comparison.case, "batch": comparison.batch}
    return [
        {**where, "provider": provider, "setting": setting, "reason": reason}
        for (provider, setting), reason in comparison.failures.items()
    ]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = best_rows(config.stash[_ROWS])
    if not rows:
        return
    terminalreporter.section(f"fastest setting of each provider; ratios of pairs, over {OURS}")
    for line in bench_table(rows).splitlines():
        terminalreporter.line(line)
