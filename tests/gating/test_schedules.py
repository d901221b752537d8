from __future__ import annotations

import pytest

from gatedconv.gating import schedules


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.0), (124, 0.0), (125, 2.0), (189, 2.0), (190, 3.0), (349, 3.0), (350, 3.0)]
)
def test_rising_is_table_6(epoch: int, expected: float) -> None:
    assert schedules.rising(epoch / 350) == expected


def test_rising_scales_with_its_last_value() -> None:
    assert [schedules.rising(progress, 6.0) for progress in (0.0, 0.4, 1.0)] == [0.0, 4.0, 6.0]


def test_linear_warmup_is_a_line_then_flat() -> None:
    values = [schedules.linear_warmup(progress, 8.0, 0.25) for progress in (0.0, 0.125, 0.25, 0.9)]
    assert values == [0.0, 4.0, 8.0, 8.0]


def test_linear_warmup_of_no_duration_is_constant() -> None:
    assert schedules.linear_warmup(0.0, 8.0, 0.0) == 8.0


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    for call in (lambda: schedules.rising(progress), lambda: schedules.linear_warmup(progress, 1.0, 0.5)):
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\]"):
            call()


def test_a_duration_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="duration must be"):
        schedules.linear_warmup(0.5, 1.0, 1.5)


def test_the_macs_fall_straight_or_mostly_early() -> None:
    """At a quarter of the way 3/4 of the fall is left; of a cubic one (3/4)^3 = 27/64."""
    assert schedules.falling(0.1, 0.5, 0.2, 0.6) == schedules.falling(0.2, 0.5, 0.2, 0.6, 3.0) == 1.0
    assert schedules.falling(0.3, 0.5, 0.2, 0.6) == pytest.approx(0.875)
    assert schedules.falling(0.3, 0.5, 0.2, 0.6, 3.0) == pytest.approx(0.5 + 0.5 * 27 / 64)
    assert schedules.falling(0.6, 0.5, 0.2, 0.6, 3.0) == schedules.falling(1.0, 0.5, 0.2, 0.6) == 0.5
    assert schedules.falling(0.2, 0.5, 0.2, 0.2, 3.0) == 0.5
    with pytest.raises(ValueError, match="power must be above 0, got 0"):
        schedules.falling(0.3, 0.5, 0.2, 0.6, 0.0)
