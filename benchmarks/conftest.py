"""Options and the closing table of ``pytest benchmarks``; ``--benchmark-json FILE`` keeps the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.masked_conv2d import MOST_ROUNDS
from gatedconv.bench.comparison import Comparison, Row, bench_table, best_rows
from gatedconv.bench.runtimes import OURS

CACHE = Path(__file__).resolve().parent.parent / "build" / "bench"
_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gatedconv benchmarks")
    group.addoption("--rounds", type=int, default=15, help="rounds of each case [15]")
    group.addoption("--threads", type=int, default=2, help="CPU threads of every provider [2]")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: in the short selection that `make bench` runs")
    config.stash[_ROWS] = []


def as_parameter(case: Any, name: str, quick: bool) -> Any:
    """A case as a test parameter, with its name, hyphenated, and the mark of the short selection."""
    return pytest.param(case, id=name.replace(" ", "-"), marks=[pytest.mark.quick] * quick)


@pytest.fixture(scope="session")
def cpu_threads(pytestconfig: pytest.Config) -> Iterator[int]:
    before = torch.get_num_threads()
    threads: int = pytestconfig.getoption("--threads")
    torch.set_num_threads(threads)
    yield threads
    torch.set_num_threads(before)


@pytest.fixture
def compete(pytestconfig: pytest.Config, benchmark: Any, cpu_threads: int) -> Callable[[Comparison], None]:
    """Measures a comparison."""

    def measure(comparison: Comparison) -> None:
        rounds = pytestconfig.getoption("--rounds")
        sample_rounds(benchmark, comparison, min(rounds, MOST_ROUNDS) if comparison.benchmark == "layer" else rounds)
        rows = comparison.rows()
        pytestconfig.stash[_ROWS] += rows
        benchmark.group = f"{comparison.case}, batch {comparison.batch}"
        benchmark.extra_info.update(rows=[row.as_dict() for row in rows], failures=comparison.failure_rows())

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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found: list[Row] = config.stash[_ROWS]
    rows = best_rows(found)
    if not rows:
        return
    terminalreporter.section(f"fastest setting of each provider; ratios of pairs, over {OURS}")
    for line in bench_table(rows).splitlines():
        terminalreporter.line(line)
