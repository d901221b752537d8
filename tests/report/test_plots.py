from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gatedconv.report import plots


def history(gates: int = 3, epochs: int = 10, *, weights: list[float] | None = None) -> list[dict[str, Any]]:
    lines = []
    rates = {f"layer{i}.0.layer_gate": float(i % 2) for i in range(gates)}
    for phase in ("dense", "gated"):
        for epoch in range(1, epochs + 1):
            gated = phase == "gated"
            lines.append(
                {
                    "phase": phase,
                    "epoch": epoch,
                    "train_top1": 50.0 + epoch,
                    "test_top1": 60.0 + epoch,
                    "open_rate": 0.5,
                    "macs": 0.6,
                    "polarization": 0.1,
                    "polar_weight": (weights or [0.0] * epochs)[epoch - 1],
                    "gate_open_rates": rates if gated else {},
                }
            )
    return lines


@pytest.mark.parametrize("gates", [3, 54])
def test_every_plot_is_drawn(tmp_path: Path, gates: int) -> None:
    drawn = plots.draw_all(history(gates), tmp_path / "plots", title="resnet20")
    assert [path.name for path in drawn] == ["curves.png", "gate_evolution.png"]
    for path in drawn:
        with Image.open(path) as image:
            assert image.width > 800 and np.asarray(image.convert("L")).std() > 5


def test_rows_of_the_heat_map_are_gates_in_order(tmp_path: Path) -> None:
    path = plots.draw_gate_evolution(history(4), tmp_path / "g.png")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    column = pixels[:, pixels.shape[1] // 2]
    # Gates 1 and 3 are open (dark), 0 and 2 closed (light): going down, light and dark take timing.
    rows = [value for value in column if value < 120 or 235 < value < 253]
    changes = [value < 120 for i, value in enumerate(rows) if i == 0 or (value < 120) != (rows[i - 1] < 120)]
    assert changes[:4] == [False, True, False, True]


def test_a_dense_run_gets_curves_alone(tmp_path: Path) -> None:
    lines = [line for line in history() if line["phase"] == "dense"]
    assert [path.name for path in plots.draw_all(lines, tmp_path)] == ["curves.png"]


def test_only_jumps_of_lambda_are_marked() -> None:
    staged = [0.0] * 3 + [2.0] * 3 + [3.0] * 4
    ramp = [0.3 * epoch for epoch in range(10)]
    gated = {
        name: [line for line in history(weights=weights) if line["phase"] == "gated"]
        for name, weights in (("staged", staged), ("ramp", ramp), ("constant", [3.0] * 10))
    }
    assert {name: plots._jumps(lines) for name, lines in gated.items()} == {
        "staged": [(4, 2.0), (7, 3.0)],
        "ramp": [],
        "constant": [],
    }
