"""Latency of models side by side, measured in turns: a noisy machine is noisy for all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gatedconv.measure.turns import Name, Turns


@dataclass(frozen=True)
class Latency:
    """Time of one call, in ms: median and spread (75th minus 25th percentile) of rounds, and the least."""

    median: float
    least: float
    iqr: float
    rounds: int


@torch.inference_mode()
def measure_latency(
    models: Mapping[Name, Callable[[Tensor], object]],
    example_input: Tensor,
    *,
    rounds: int = 21,
    warmup: int = 3,
    min_ms: float = 5.0,
) -> dict[Name, Latency]:
    """Time several models on one input, in turns: round 1 of each, then round 2 of each, and so on.

    Args:
        models: name -> callable; networks must be in eval mode and on the input's device.
        example_input: (N, C, H, W), the batch to run.
        rounds: measurements per model.
        warmup: calls of each model before any is timed.
        min_ms: least duration of one measurement; faster models are called several times in it.

    Returns:
        name -> `Latency` of one call.

    Raises:
        ValueError: no models, or fewer than one round.
    """
    if not models:
        raise ValueError("measure_latency: expected at least one model, got none")
    if rounds < 1 or warmup < 1:
        raise ValueError(
            f"measure_latency: expected at least 1 round and 1 warm-up, got {rounds} and {warmup}"
        )
    calls = {name: partial(model, example_input) for name, model in models.items()}
    synchronize = partial(torch.cuda.synchronize, example_input.device) if example_input.is_cuda else None
    turns = Turns(calls, turn_ms=min_ms, warmup=warmup, lead_in=0, settle=False, synchronize=synchronize)
    for _ in range(rounds):
        turns.round()
    spreads = {name: turns.spread(name) for name in models}
    return {name: Latency(at.median, at.least, at.iqr, rounds) for name, at in spreads.items()}
