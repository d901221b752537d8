"""Timing several callables in turns, so that a noisy machine is noisy for all of them alike.

In a round each entrant has one turn. A turn waits until no thread of this process is busy any more (the
pools of OpenMP and ONNX Runtime spin for some milliseconds after their last call, on cores that the next
entrant needs), makes a call to warm the caches, then times single calls. Entrants may be compared round by
round: what disturbed one round disturbed all of it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Name = TypeVar("Name")

SETTLE_STEP_S = 0.002
SETTLE_LIMIT_S = 0.1
OVERTIME = 3
MAX_CALLS = 1000
IDLE_SHARE = 0.2  # a process that uses less of one core than this while its main thread sleeps is at rest


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and least value of some figures, in their unit."""

    median: float
    lower: float
    upper: float
    least: float

    @property
    def iqr(self) -> float:
        """Interquartile range: 75th minus 25th percentile."""
        return self.upper - self.lower

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value; quartiles are interpolated between the values themselves."""
        if not values:
            raise ValueError("Spread.of: expected at least one value, got none")
        lower = middle = upper = values[0]
        if len(values) > 1:
            lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, lower, upper, min(values))


class Turns(Generic[Name]):
    """The samples of some callables, taken in turns.

    Args:
        entrants: name -> callable without arguments; one call of it is what is timed.
        turn_ms: least duration of the timed calls of a turn, in ms; a slower entrant is called once.
        warmup: calls of each entrant before anything is timed.
        lead_in: calls at the start of each turn that are not timed.
        settle: whether a turn waits for the threads of other entrants to come to rest.
        synchronize: called before each reading of the clock; for devices that run on after a call.

    Attributes:
        samples: name -> median ms of the calls of a turn, one value per round.
        least: name -> ms of the fastest single call.
        calls: name -> timed calls per turn, fewer where that takes three times as long as it should.

    Raises:
        ValueError: no entrants, or no warm-up.
    """

    def __init__(
        self,
        entrants: Mapping[Name, Callable[[], object]],
        *,
        turn_ms: float = 30.0,
        warmup: int = 3,
        lead_in: int = 1,
        settle: bool = True,
        synchronize: Callable[[], object] | None = None,
    ) -> None:
        if not entrants:
            raise ValueError("Turns: expected at least one entrant, got none")
        if warmup < 1:
            raise ValueError(f"Turns: expected at least 1 warm-up call, got {warmup}")
        self.entrants = dict(entrants)
        self.samples: dict[Name, list[float]] = {name: [] for name in entrants}
        self.least: dict[Name, float] = {}
        self.calls: dict[Name, int] = {}
        self._turn_ms, self._lead_in, self._settle, self._synchronize = turn_ms, lead_in, settle, synchronize
        for name, entrant in self.entrants.items():
            # The first calls may compile or allocate: only the fastest says how many fit in a turn.
            fastest = min(self._call_ms(entrant) for _ in range(warmup))
            self.calls[name] = max(1, min(MAX_CALLS, round(turn_ms / max(fastest, 1e-6))))

    def prepare(self, name: Name) -> None:
        """The untimed part of a turn: wait for rest, then lead in."""
        if self._settle:
            wait_for_rest()
        for _ in range(self._lead_in):
            self.entrants[name]()

    def play(self, name: Name) -> None:
        """The timed part of a turn: add one sample."""
        entrant, collecting = self.entrants[name], gc.isenabled()
        gc.disable()
        try:
            times = self._times(entrant, self.calls[name])
        finally:
            if collecting:
                gc.enable()
        self.samples[name].append(statistics.median(times))
        self.least[name] = min(*times, self.least.get(name, times[0]))

    def round(self, names: Iterable[Name] | None = None) -> None:
        """One turn for each entrant, or for each of those named."""
        for name in self.entrants if names is None else names:
            self.prepare(name)
            self.play(name)

    def spread(self, name: Name) -> Spread:
        """Of an entrant's ms per call; ``least`` is its fastest call."""
        of_rounds = Spread.of(self.samples[name])
        return Spread(of_rounds.median, of_rounds.lower, of_rounds.upper, self.least[name])

    def ratio(self, name: Name, base: Name) -> Spread:
        """Of an entrant's time over that of ``base``, round by round: 2 where ``base`` takes half as long."""
        pairs = zip(self.samples[name], self.samples[base], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])

    def _times(self, entrant: Callable[[], object], calls: int) -> list[float]:
        times: list[float] = []
        # Where calls take far longer now than at the start, fewer of them have to do.
        while not times or (len(times) < calls and sum(times) < OVERTIME * self._turn_ms):
            times.append(self._call_ms(entrant))
        return times

    def _call_ms(self, entrant: Callable[[], object]) -> float:
        if self._synchronize is not None:
            self._synchronize()
        started = time.perf_counter()
        entrant()
        if self._synchronize is not None:
            self._synchronize()
        return (time.perf_counter() - started) * 1000


def wait_for_rest() -> float:
    """Sleep until the threads of this process leave the cores alone; returns the seconds that it took."""
    started = time.monotonic()
    while time.monotonic() - started < SETTLE_LIMIT_S:
        busy = time.process_time()
        time.sleep(SETTLE_STEP_S)
        if time.process_time() - busy < IDLE_SHARE * SETTLE_STEP_S:
            break
    return time.monotonic() - started
