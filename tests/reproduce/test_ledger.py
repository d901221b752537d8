from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict
from pathlib import Path

import pytest

from reproduce.ledger import append_row, read_json_lines, read_ledger
from tests.reproduce.ledger_rows import row

REQUIRED = (
    "experiment",
    "seed",
    "dataset",
    "model",
    "kind",
    "top1_last",
    "macs",
    "macs_dense",
    "open_ratio",
    "pruning_rate",
    "polar",
    "agreement",
    "top1_dynamic",
    "macs_dynamic",
    "epochs",
    "device",
    "commit",
    "versions",
    "wall_s",
    "energy_j",
)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ledger.jsonl"
    rows = [row(), row(seed=1, energy_j=3.5), row("headline-r56-c10-dense", kind="dense", agreement=None)]
    for each in rows:
        append_row(path, each)
    assert list(read_ledger(path).values()) == rows
    for line in path.read_text().splitlines():
        assert set(REQUIRED) <= json.loads(line).keys()
    assert json.loads(path.read_text().splitlines()[0])["energy_j"] is None
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".ledger.jsonl.lock", "ledger.jsonl"]


def test_no_ledger_has_no_rows(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "ledger.jsonl") == {}


def test_a_run_has_one_row(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_row(path, row())
    before = path.read_text()
    with pytest.raises(ValueError, match="has a row of headline-r56-c10, seed 0 already"):
        append_row(path, row(top1_last=99.0))
    assert path.read_text() == before
    path.write_text(before + before)
    with pytest.raises(ValueError, match="line 2: a second row of headline-r56-c10, seed 0"):
        read_ledger(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ('{"experiment": "a', "line 2 is damaged, expected JSON"),
        ("[1, 2]", "line 2: expected a JSON object, found list"),
        (json.dumps({"experiment": "a"}), "line 2: missing .* required .*'seed'"),
        (json.dumps(asdict(row()) | {"acuracy": 3}), "line 2: unknown field 'acuracy'"),
        (json.dumps(asdict(row()) | {"kind": "dance"}), "line 2: kind: expected one of gated, dense"),
        (json.dumps(asdict(row()) | {"top1_last": "93"}), "line 2: top1_last: expected int or float, got '93'"),
        (json.dumps(asdict(row()) | {"top1_last": float("nan")}), "line 2: top1_last: expected a finite number"),
        (json.dumps(asdict(row()) | {"top1_last": 930}), "line 2: top1_last: expected at most 100, got 930"),
        (json.dumps(asdict(row()) | {"macs_dense": 0}), "line 2: macs_dense: expected more than 0, got 0"),
        (json.dumps(asdict(row()) | {"agreement": -0.1}), "line 2: agreement: expected at most 1"),
        (json.dumps(asdict(row()) | {"seed": True}), "line 2: seed: expected int, got True"),
        (json.dumps(asdict(row()) | {"dataset": "data/c10.npz"}), "line 2: dataset: expected a name, not a path"),
    ],
)
def test_damage_is_reported_by_line_and_field_and_nothing_is_written(tmp_path: Path, damage: str, message: str) -> None:
    path = tmp_path / "ledger.jsonl"
    append_row(path, row(seed=3))
    path.write_text(path.read_text() + damage + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        read_ledger(path)
    with pytest.raises(ValueError, match=message):
        append_row(path, row(seed=4))
    assert path.read_bytes() == before


def test_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_row(path, row())
    path.write_text(f"\n{path.read_text()}  \n\n")
    append_row(path, row(seed=1))
    assert list(read_ledger(path)) == [row().key, row(seed=1).key]
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text() + "\n{\n")
    with pytest.raises(ValueError, match="line 4 is damaged"):
        read_ledger(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        read_ledger(path)


def _append_many(path: Path, experiment: str, count: int) -> None:
    for seed in range(count):
        append_row(path, row(experiment, seed))


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, name, 15)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert set(read_ledger(path)) == {(name, seed) for name in "abc" for seed in range(15)}


def test_a_crash_before_the_file_is_complete_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    append_row(path, row())
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"ledger.jsonl: could not be written \(No space left on device\)"):
        append_row(path, row(seed=1))
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_json_lines_come_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 2.5, "b": 1}\n{"a": null}\n')
    found = list(read_json_lines(path))
    assert found == [(f"{path}: line 2", {"a": 2.5, "b": 1}), (f"{path}: line 3", {"a": None})]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}\n{\n", r"a: line 2 is damaged, expected JSON \("), (b"\xff", "a: expected UTF-8 text")],
)
def test_damaged_json_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_json_lines(tmp_path / "a"))
