from __future__ import annotations

import gc
import threading
import time

import pytest

from gatedconv.measure import turns as module
from gatedconv.measure.turns import Spread, Turns, wait_for_rest


class Clock:
    """A clock that moves only when an entrant says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def entrant(self, *durations_ms: float, log: list[str] | None = None, name: str = "") -> object:
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


def test_entrants_take_turns_with_a_lead_in(clock: Clock) -> None:
    log: list[str] = []
    entrants = {name: clock.entrant(10, log=log, name=name) for name in "ab"}
    turns = Turns(entrants, turn_ms=20, warmup=2, lead_in=1, settle=False)
    assert turns.calls == {"a": 2, "b": 2}
    turns.round()
    turns.round()
    assert "".join(log) == "aabb" + "aaabbb" * 2
    assert [len(turns.samples[name]) for name in "ab"] == [2, 2]


def test_a_sample_is_the_median_call_and_the_least_is_kept(clock: Clock) -> None:
    # Warm-up 2, 2; then per turn a lead-in and three calls: 4 | 9 1 3 and 4 | 2 8 5.
    turns = Turns({"a": clock.entrant(2, 2, 4, 9, 1, 3, 4, 2, 8, 5)}, turn_ms=6, warmup=2, settle=False)
    turns.round()
    turns.round()
    assert turns.samples["a"] == pytest.approx([3, 5])
    spread = turns.spread("a")
    assert (spread.median, spread.lower, spread.upper, spread.least, spread.iqr) == pytest.approx(
        (4, 3.5, 4.5, 1, 1)
    )


def test_ratios_are_of_pairs_within_a_round() -> None:
    turns = Turns({"ours": lambda: None, "theirs": lambda: None}, settle=False)
    # A machine that is four times slower in the second round: ratios of medians would not be 2, 2, 3.
    turns.samples = {"ours": [1.0, 4.0, 1.0], "theirs": [2.0, 8.0, 3.0]}
    ratio = turns.ratio("theirs", "ours")
    assert (ratio.median, ratio.least, ratio.upper) == pytest.approx((2, 2, 2.5))
    turns.samples["ours"].pop()
    with pytest.raises(ValueError, match="shorter"):
        turns.ratio("theirs", "ours")


def test_a_turn_in_which_calls_became_slow_is_cut_short(clock: Clock) -> None:
    turns = Turns({"a": clock.entrant(1, 1, 1, 50)}, turn_ms=10, warmup=3, lead_in=0, settle=False)
    assert turns.calls["a"] == 10
    log_before = clock.now
    turns.round()
    assert turns.samples["a"] == pytest.approx([50]) and clock.now - log_before == pytest.approx(0.05)


def test_slow_first_calls_do_not_set_the_number_of_calls(clock: Clock) -> None:
    assert Turns({"a": clock.entrant(900, 3, 2)}, turn_ms=8, warmup=3, settle=False).calls == {"a": 4}
    assert Turns({"a": clock.entrant(900)}, turn_ms=8, warmup=1, settle=False).calls == {"a": 1}


def test_the_clock_is_read_after_the_device_has_finished(clock: Clock) -> None:
    def synchronize() -> None:
        clock.now += 0.001

    turns = Turns({"a": clock.entrant(1)}, turn_ms=1, lead_in=0, settle=False, synchronize=synchronize)
    turns.round()
    assert turns.samples["a"] == pytest.approx([2])


def test_garbage_collection_waits_for_the_end_of_a_turn() -> None:
    seen: list[bool] = []
    turns = Turns({"a": lambda: seen.append(gc.isenabled())}, turn_ms=0, warmup=1, lead_in=1, settle=False)
    turns.round()
    assert seen == [True, True, False] and gc.isenabled()


def test_rest_is_waited_for() -> None:
    assert wait_for_rest() < module.SETTLE_LIMIT_S
    until = time.monotonic() + 0.04
    busy = threading.Thread(target=lambda: [None for _ in iter(lambda: time.monotonic() < until, False)])
    busy.start()
    wait_for_rest()
    assert time.monotonic() >= until
    busy.join()


def test_spread_of_values() -> None:
    assert Spread.of([2.0]) == Spread(2, 2, 2, 2)
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3, 2, 4, 1)
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one entrant"):
        Turns({})
    with pytest.raises(ValueError, match="at least 1 warm-up"):
        Turns({"a": lambda: None}, warmup=0)
