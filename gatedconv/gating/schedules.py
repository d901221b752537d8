"""Schedules of loss weights and of the MAC target: pure functions of the progress of a run, a float in [0, 1].

The learning rate's are in ``train/optimizer.py``.
"""

from __future__ import annotations

__all__ = ["falling", "linear_warmup", "rising"]

# Table 6 of the paper, "rising λ": 0 for the first 125 of 350 epochs, 2 for the next 65, then 3 to the end.
# Kept as fractions of the run so that a run of any length passes through the same three stages.
RISING_BOUNDARIES = (125 / 350, 190 / 350)
RISING_VALUES = (0.0, 2.0, 3.0)


def rising(progress: float, final: float = RISING_VALUES[-1]) -> float:
    """Rising λ of Table 6: 0, 2, 3 over the run, scaled so that the last stage has the value `final`.

    Raises:
        ValueError: if `progress` is outside [0, 1].
    """
    _check_progress(progress)
    stage = sum(progress >= boundary for boundary in RISING_BOUNDARIES)  # a boundary belongs to the stage that it opens
    return RISING_VALUES[stage] * (final / RISING_VALUES[-1])


def linear_warmup(progress: float, value: float, duration: float) -> float:
    """Rise in a straight line from 0 to `value` over the first `duration` of the run, then stay there.

    Raises:
        ValueError: if `progress` or `duration` is outside [0, 1].
    """
    _check_progress(progress)
    if not 0.0 <= duration <= 1.0:
        raise ValueError(f"linear_warmup: duration must be in [0, 1], got {duration}")
    return value if progress >= duration else value * progress / duration


def falling(progress: float, final: float, start: float, end: float, power: float = 1.0) -> float:
    """Fall from 1 at `start` to `final` at `end`; 1 before, `final` after.

    The rest of the fall shrinks as (1 - t)^power, t from 0 at `start` to 1 at `end`: a straight line with 1, most of it
    early with more (3 in Zhu and Gupta 2017).

    Raises:
        ValueError: if `progress` is outside [0, 1], `start` comes after `end`, or `power` is not above 0.
    """
    _check_progress(progress)
    if start > end:
        raise ValueError(f"falling: start must not come after end, got {start} and {end}")
    if not power > 0:
        raise ValueError(f"falling: power must be above 0, got {power}")
    if progress >= end:
        return final
    return 1.0 if progress <= start else final + (1 - final) * ((end - progress) / (end - start)) ** power


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
