"""The benchmark of the runtime and the engine: its rows and table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import runtime_speed


def test_rows_have_both_and_make_a_table(rt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_speed, "FILE", tmp_path / "runtime.json")
    assert runtime_speed.section() == "Not measured yet."
    runtime_speed.main(["--rounds=1", "--threads=1", "--only=demo", f"--out={runtime_speed.FILE}"])
    rows = json.loads(runtime_speed.FILE.read_text())["rows"]
    assert [(row["network"], row["batch"], row["equal"]) for row in rows] == [("demo", 1, True), ("demo", 32, True)]
    for row in rows:
        assert row["least_ratio"] == pytest.approx(row["runtime_ms"] / row["engine_ms"], rel=0.1)
    kept = sum(row["least_ratio"] <= 1.03 for row in rows)
    text = runtime_speed.section()
    assert "| demo | 32 | 1 | " in text and f"In {kept} of 2 rows the runtime takes at most 3% longer" in text


def test_the_demos_network_has_half_of_its_blocks() -> None:
    small, x = runtime_speed.RuntimeCase("demo", 2).build()
    assert x.shape == (2, 1, 8, 8) and small(x).shape == (2, 10)
    dense = runtime_speed.gatedconv.models.resnet20(10, input_size=(1, 8, 8))
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
    assert 0.2 < share < 0.8
