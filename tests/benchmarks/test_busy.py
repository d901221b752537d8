"""The benchmark with a busy core: its rows and table, and the process that is busy."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import busy
from benchmarks.networks import NetworkCase
from tests.tolerances import in_decimals


def test_rows_have_both_loads_and_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(busy, "CASES", tuple(NetworkCase("resnet20", "dense", n) for n in (1, 2)))
    monkeypatch.setattr(
        busy, "CANDIDATES", {("gatedconv", "Engine"): "gatedconv", ("eager", "NCHW"): "eager", ("gone", ""): "gone"}
    )
    monkeypatch.setattr(busy, "FILE", tmp_path / "busy.json")
    assert busy.section() == "Not measured yet."
    busy.main(["--rounds=1", "--seconds=0.01", "--threads=1", f"--out={tmp_path / 'busy.json'}"])
    rows = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == 2 * ["gatedconv", "eager"]
    told = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"{row['case']}, batch {row['batch']}, {row['runtime']}" for row in rows]
    assert all(row["loss"] == in_decimals(row["busy_ms"] / row["quiet_ms"], 3, sides=2) for row in rows)
    assert "| resnet20 dense | 1 | gatedconv | " in busy.section()


def test_the_process_computes_only_meanwhile() -> None:
    def status() -> tuple[str, int]:
        """State and ticks of user time."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[11])

    core = busy.BusyCore()
    pid = core._process.pid
    try:
        with core.running():
            start = status()[1]
            while status()[1] < start + 2:
                time.sleep(0.01)
        while status()[0] != "T":  # until the signal has arrived
            time.sleep(0.01)
        stopped = status()[1]
        time.sleep(0.05)
        assert status()[1] == stopped
    finally:
        core.close()
    assert core._process.returncode is not None
