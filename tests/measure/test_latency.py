from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from gatedconv.measure.latency import measure_latency


def sleeper(seconds: float, calls: list[str], name: str) -> object:
    def model(x: Tensor) -> Tensor:
        calls.append(name)
        time.sleep(seconds)
        return x

    return model


def test_medians_are_milliseconds_per_call() -> None:
    calls: list[str] = []
    models = {"slow": sleeper(0.012, calls, "slow"), "fast": sleeper(0.003, calls, "fast")}
    measured = measure_latency(models, torch.zeros(1), rounds=5, warmup=1, min_ms=6.0)
    assert 12 <= measured["slow"].least <= measured["slow"].median
    assert 3 <= measured["fast"].least <= measured["fast"].median < measured["slow"].median
    assert measured["slow"].rounds == 5 and measured["slow"].iqr >= 0


def test_models_take_turns() -> None:
    calls: list[str] = []
    models = {name: sleeper(0.002, calls, name) for name in "ab"}
    measure_latency(models, torch.zeros(1), rounds=3, warmup=1, min_ms=0.0)
    assert "".join(calls) == "ab" + "ab" * 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="expected at least one model"):
        measure_latency({}, torch.zeros(1))
    with pytest.raises(ValueError, match="at least 1 round"):
        measure_latency({"a": lambda x: x}, torch.zeros(1), rounds=0)
