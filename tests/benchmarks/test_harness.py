from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import HEADER, Record, default_path, device_name, gpu_name, machine_header, read
from gatedconv.report.bench import Row

ROW = Row("network", "net", 1, "float32", "eager", "NCHW", 2.0, 1.5, 0.25, 3, None, None, None, 1e-7)


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    return machine_header(threads=2)


def test_the_header_names_machine_and_versions(header: dict[str, Any]) -> None:
    assert set(header) == set(HEADER)
    assert header["threads"] == 2 and header["cuda"] is None and header["versions"]["torch"]
    assert json.loads(json.dumps(header)) == header


def test_rows_are_kept_and_a_run_resumes(header: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "some-folder" / "r.json"
    first = Record(path, header)
    first.add([ROW], [])
    first.add([dataclasses.replace(ROW, batch=8)], [{"case": "net", "reason": "none"}])
    again = Record(path, {**header, "date": "2001-01-01"})
    assert [again.has("network", "net", batch) for batch in (1, 8, 32)] == [True, True, False]
    assert not again.has("layer", "net", 1)
    found = read(path)
    assert found["rows"][0] == ROW.as_dict() and found["failures"] == [{"case": "net", "reason": "none"}]
    assert {key: found[key] for key in HEADER} == header
    assert {
        "benchmark",
        "case",
        "batch",
        "dtype",
        "provider",
        "ms_median",
        "ms_min",
        "ms_iqr",
        "launches",
        "bytes_peak",
    } <= set(found["rows"][0])


def test_results_of_another_set_up_are_not_mixed_in(header: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Record(path, header).add([ROW], [])
    with pytest.raises(ValueError, match=r"another machine or version \(threads, commit differ\)"):
        Record(path, {**header, "threads": 1, "commit": "0" * 40})


def test_a_file_with_a_missing_key_is_refused(header: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    body = {**header, "rows": [{**ROW.as_dict()}], "failures": []}
    del body["commit"], body["rows"][0]["error"]
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="commit, error"):
        read(path)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4", "a100"),
    ],
)
def test_gpu_names(device: str, name: str) -> None:
    assert gpu_name(device) == name


@pytest.mark.parametrize(
    ("model", "limited", "name"),
    [
        ("AMD EPYC 7763 64-Core Processor", False, "epyc-2c"),
        ("Intel(R) Xeon(R) Platinum 8375C", True, "xeon-2c-avx2"),
        ("Something Else", False, "cpu-2c"),
    ],
)
def test_device_names(model: str, limited: bool, name: str) -> None:
    assert device_name(model, 2, limited) == name


def test_files_are_named_by_device_torch_and_commit(header: dict[str, Any], tmp_path: Path) -> None:
    given = {**header, "device": "epyc-2c", "torch": "2.13.0+cpu", "commit": "0123456789abcdef+changes"}
    assert default_path(given, tmp_path).name == "epyc-2c-2.13.0-cpu-0123456789.json"
