"""Latency of models side by side, measured in turns: a noisy machine is noisy for all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name")


@dataclass(frozen=True)
class Latency:
    """Time of one call, in ms: median, least and spread (75th minus 25th percentile) over the rounds."""

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
    repeats = {}
    for name, model in models.items():
        for _ in range(warmup):
            duration = _timed(model, example_input, 1)
        repeats[name] = max(1, round(min_ms / max(duration, 1e-3)))
    samples: dict[Name, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            samples[name].append(_timed(model, example_input, repeats[name]))
    return {name: _summary(values) for name, values in samples.items()}


def _timed(model: Callable[[Tensor], object], example_input: Tensor, repeats: int) -> float:
    """Milliseconds per call; on a GPU the device has finished before either reading of the clock."""
    _synchronize(example_input)
    started = time.perf_counter()
    for _ in range(repeats):
        model(example_input)
    _synchronize(example_input)
    return (time.perf_counter() - started) * 1000 / repeats


def _synchronize(example_input: Tensor) -> None:
    if example_input.is_cuda:
        torch.cuda.synchronize(example_input.device)


def _summary(values: list[float]) -> Latency:
    spread = 0.0
    if len(values) > 1:
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        spread = upper - lower
    return Latency(statistics.median(values), min(values), spread, len(values))
