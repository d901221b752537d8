"""The results that the repository keeps are those that the project promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
DEMO = RESULTS / "demo" / "summary.json"
SEEDS = sorted((RESULTS / "demo-seeds").glob("*.json"))


def assert_figures(summary: dict[str, Any]) -> None:
    dense, frozen = summary["dense"], summary["frozen"]
    assert frozen["macs"] <= 0.55 * dense["macs"]
    assert frozen["top1"] >= dense["top1"] - 1.5
    assert summary["agreement"] >= 0.99


def test_several_seeds_of_either_gate_are_kept() -> None:
    gates = [json.loads(path.read_text())["gate"] for path in SEEDS]
    assert min(gates.count("layer"), gates.count("channel")) >= 3


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.stem)
def test_every_seed_of_the_demo_meets_the_figures(path: Path) -> None:
    assert_figures(json.loads(path.read_text()))


@pytest.mark.skipif(not DEMO.is_file(), reason="the demo's run is not kept here")
def test_the_demo_meets_the_figures_and_is_faster() -> None:
    summary = json.loads(DEMO.read_text())
    assert_figures(summary)
    assert summary["frozen"]["latency_ms"]["32"] < summary["dense"]["latency_ms"]["32"]


@pytest.mark.parametrize(
    ("network", "figure", "value"), [("frozen", "macs", 56), ("frozen", "top1", 97.4), (None, "agreement", 0.98)]
)
def test_figures_that_fall_short_are_found(network: str | None, figure: str, value: float) -> None:
    summary: dict[str, Any] = {
        "dense": {"macs": 100, "top1": 99.0},
        "frozen": {"macs": 55, "top1": 97.5},
        "agreement": 0.99,
    }
    assert_figures(summary)
    (summary if network is None else summary[network])[figure] = value
    with pytest.raises(AssertionError):
        assert_figures(summary)
