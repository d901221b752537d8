from __future__ import annotations

import gc

import pytest

from gatedconv.measure import latency as module
from gatedconv.measure.latency import Interleaved, Spread, wait_until_idle


class Clock:
    """A clock that only a candidate moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def candidate(self, *durations_ms: float, log: list[str] | None = None, name: str = "") -> object:
        """A callable whose calls take these times, the last one for ever."""
        left = list(durations_ms)

        def call() -> None:
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1000
            if log is not None:
                log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_candidates_are_interleaved_with_lead_in_calls(clock: Clock) -> None:
    log: list[str] = []
    candidates = {name: clock.candidate(10, log=log, name=name) for name in "ab"}
    timing = Interleaved(candidates, sample_ms=20, warmup=2, lead_in=1, wait=False)
    assert timing.calls == {"a": 2, "b": 2}
    timing.round()
    timing.round()
    assert "".join(log) == "aabb" + "aaabbb" * 2
    assert [len(timing.samples[name]) for name in "ab"] == [2, 2]


def test_a_sample_is_the_median_call_and_the_least_is_kept(clock: Clock) -> None:
    # Warm-up 2, 2; then per sample a lead-in and three calls: 4 | 9 1 3 and 4 | 2 8 5.
    timing = Interleaved({"a": clock.candidate(2, 2, 4, 9, 1, 3, 4, 2, 8, 5)}, sample_ms=6, warmup=2, wait=False)
    timing.round()
    timing.round()
    assert timing.samples["a"] == pytest.approx([3, 5])
    spread = timing.spread("a")
    assert (spread.median, spread.lower, spread.upper, spread.least, spread.iqr) == pytest.approx((4, 3.5, 4.5, 1, 1))


def test_ratios_are_of_pairs_within_a_round() -> None:
    timing = Interleaved({"ours": lambda: None, "theirs": lambda: None}, wait=False)
    # A machine that is four times slower in the second round: ratios of medians would not be 2, 2, 3.
    timing.samples = {"ours": [1.0, 4.0, 1.0], "theirs": [2.0, 8.0, 3.0]}
    ratio = timing.ratio("theirs", "ours")
    assert (ratio.median, ratio.least, ratio.upper) == pytest.approx((2, 2, 2.5))
    timing.samples["ours"].pop()
    with pytest.raises(ValueError, match="shorter"):
        timing.ratio("theirs", "ours")


def test_a_sample_whose_calls_became_slow_has_fewer(clock: Clock) -> None:
    timing = Interleaved({"a": clock.candidate(1, 1, 1, 50)}, sample_ms=10, warmup=3, lead_in=0, wait=False)
    assert timing.calls["a"] == 10
    log_before = clock.now
    timing.round()
    assert timing.samples["a"] == pytest.approx([50]) and clock.now - log_before == pytest.approx(0.05)


def test_slow_first_calls_do_not_set_the_number_of_calls(clock: Clock) -> None:
    assert Interleaved({"a": clock.candidate(900, 3, 2)}, sample_ms=8, warmup=3, wait=False).calls == {"a": 4}
    assert Interleaved({"a": clock.candidate(900)}, sample_ms=8, warmup=1, wait=False).calls == {"a": 1}


def test_the_clock_is_read_after_the_device_has_finished(clock: Clock) -> None:
    def synchronize() -> None:
        clock.now += 0.001

    timing = Interleaved({"a": clock.candidate(1)}, sample_ms=1, lead_in=0, wait=False, synchronize=synchronize)
    timing.round()
    assert timing.samples["a"] == pytest.approx([2])


def test_garbage_collection_waits_for_the_end_of_a_sample() -> None:
    seen: list[bool] = []
    timing = Interleaved({"a": lambda: seen.append(gc.isenabled())}, sample_ms=0, warmup=1, lead_in=1, wait=False)
    timing.round()
    assert seen == [True, True, False] and gc.isenabled()


@pytest.mark.parametrize(("busy_s", "waited_s"), [(0.0, 0.002), (0.04, 0.042), (9.0, 0.1)])
def test_busy_threads_are_waited_for_up_to_a_limit(
    busy_s: float, waited_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads use one core until a moment: CPU time advances with the clock up to then."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "process_time", lambda: min(now[0], busy_s))
    monkeypatch.setattr(module.time, "sleep", sleep)
    assert wait_until_idle() == pytest.approx(waited_s, abs=1e-6) == now[0]


def test_spread_of_values() -> None:
    assert Spread.of([2.0]) == Spread(2, 2, 2, 2)
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3, 2, 4, 1)
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        Interleaved({})
    with pytest.raises(ValueError, match="at least 1 warm-up"):
        Interleaved({"a": lambda: None}, warmup=0)
