from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gatedconv
from gatedconv.measure.latency import block_figures, measure_latency


class Clock:
    """A clock that advances only when a model runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, list[str]()
        monkeypatch.setattr("gatedconv.measure.latency.time.perf_counter", lambda: self.now)

    def model(self, name: str, *durations_ms: float) -> Callable[[Tensor], Tensor]:
        """A model whose calls take these times, the last one from then on."""
        left = list(durations_ms)

        def call(x: Tensor) -> Tensor:
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1000
            self.log.append(name)
            return x

        return call


def test_medians_are_milliseconds_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    models = {"slow": clock.model("slow", 12, 12, 12, 12, 14, 13), "fast": clock.model("fast", 3)}
    measured = measure_latency(models, torch.zeros(1), rounds=5)
    assert measured["slow"].least == pytest.approx(12) and measured["slow"].median == pytest.approx(13)
    assert measured["fast"].median == pytest.approx(3)
    assert measured["fast"].iqr == pytest.approx(0)


def test_models_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    models = {name: clock.model(name, 4.0) for name in "ab"}
    measure_latency(models, torch.zeros(1), rounds=3)
    assert "".join(clock.log) == "aaabbb" + "ab" * 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="expected at least one candidate"):
        measure_latency({}, torch.zeros(1))
    with pytest.raises(ValueError, match="measure_latency: rounds must be at least 1, got 0"):
        measure_latency({"a": pytest.fail}, torch.zeros(1), rounds=0)


def test_the_figures_of_blocks() -> None:
    model = gatedconv.models.resnet20(gate="both", position="middle", input_size=(1, 8, 8)).eval()
    masks = {name: torch.ones(gate.num_gates, dtype=torch.bool) for name, gate in gatedconv.gates(model).items()}
    masks["layer1.1.layer_gate"][:] = False
    masks["layer2.1.channel_gate"][3:] = False
    x = torch.randn(1, 1, 8, 8)
    net = gatedconv.compact(gatedconv.freeze(model, masks=masks), x).eval()
    rows = {row["block"]: row for row in block_figures(net, masks, x, rounds=0)}
    assert list(rows) == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert rows["layer1.1"] == {"block": "layer1.1", "open": 0, "channels": 16, "runs": False, "macs": 0, "ms": None}
    assert (rows["layer2.1"]["open"], rows["layer2.1"]["channels"], rows["layer2.1"]["runs"]) == (3, 32, True)
    convolutions = 4 * 4 * 9 * 32 * 3 * 2  # two of 3 x 3 between 32 and 3 channels on 4 x 4
    assert convolutions < rows["layer2.1"]["macs"] < 1.2 * convolutions
    rest = gatedconv.count_macs(net, x) - sum(row["macs"] for row in rows.values())
    assert 0 < rest < 0.1 * gatedconv.count_macs(net, x)
    assert all(row["ms"] > 0 for row in block_figures(net, masks, x, rounds=2) if row["macs"])
