"""The tables of bfloat16 times, from times written out here."""

import json

import pytest

from benchmarks import bf16

ROWS = [
    {"case": "n1 i8 o8 h4 k1", "ms": {"float32": 0.4, "amx": 0.1, "avx512_bf16": 0.2}},
    {"case": "n1 i8 o8 h4 k3", "ms": {"float32": 0.9, "amx": 0.1, "avx512_bf16": 0.3}},
]


def test_gains_are_geometric_means():
    assert bf16.gains(ROWS) == pytest.approx({"amx": 6.0, "avx512_bf16": 6**0.5})


def test_a_row_shows_each_time_and_ratio():
    cells = [cell.strip() for cell in bf16.table(ROWS).splitlines()[-1].strip("|").split("|")]
    assert cells == ["n1 i8 o8 h4 k3", "0.9000", "0.1000", "9.00", "0.3000", "3.00"]


def test_what_is_saved_is_what_the_section_shows(tmp_path, monkeypatch):
    times = iter([ROWS[0]["ms"], ROWS[1]["ms"]])
    monkeypatch.setattr(bf16, "RESULTS", tmp_path)
    monkeypatch.setattr(bf16, "unavailable", lambda: None)
    monkeypatch.setattr(bf16, "instruction_sets", lambda: ["amx", "avx512_bf16"])
    monkeypatch.setattr(bf16, "time_case", lambda case, isas: next(times))
    monkeypatch.setattr(bf16.torch, "set_num_threads", lambda count: None)
    assert bf16.section() == "Not measured yet."
    assert bf16.main([*(row["case"] for row in ROWS), "--save"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("bf16-") and json.loads(path.read_text())["rows"] == ROWS
    assert "6.00 with amx and 2.45 with avx512_bf16" in bf16.section() and bf16.table(ROWS) in bf16.section()


def test_without_instructions_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(bf16, "unavailable", lambda: None)
    monkeypatch.setattr(bf16, "instruction_sets", list)
    with pytest.raises(SystemExit, match="no instructions for bfloat16"):
        bf16.main([])
