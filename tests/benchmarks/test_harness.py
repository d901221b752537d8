from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Machine, ResultFile, device_name, gpu_name, machine_header
from gatedconv.bench.comparison import Row

ROW = Row("network", "net", 1, "float32", "eager", "NCHW", 2.0, 1.5, 0.25, 3, None, None, None, 1e-7)


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    return machine_header(threads=2)


def test_the_header_names_machine_and_versions(machine: dict[str, Any]) -> None:
    assert {"device", "cpu", "isa", "torch", "commit", "date"} <= machine.keys()
    assert machine["threads"] == 2 and machine["cuda"] is None and machine["versions"]["torch"]
    assert json.loads(json.dumps(machine)) == machine


def test_rows_are_kept_and_a_run_resumes(machine: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "some-folder" / "r.json"
    first = ResultFile(path, machine)
    first.add([ROW.as_dict()])
    first.add([{**ROW.as_dict(), "batch": 8}], [{"case": "net", "reason": "none"}], {"net": [1]})
    again = ResultFile(path, {**machine, "date": "2001-01-01"})
    assert [again.has("net", batch) for batch in (1, 8, 32)] == [True, True, False]
    found = json.loads(path.read_text())
    assert found == again.found and found["machine"] == machine
    assert found["rows"][0] == ROW.as_dict() and found["failures"] == [{"case": "net", "reason": "none"}]
    assert found["layers"] == {"net": [1]}
    assert f"  {json.dumps(ROW.as_dict())},\n" in path.read_text()  # a row a line


def test_times_on_a_gpu_have_the_quartiles_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([10.0, 4.0, 1.0, 3.0, 2.0, 5.0])  # the first one decides how many calls a sample has
    monkeypatch.setattr(Machine, "_sample", lambda machine, call, repeats: next(samples))
    timer = Machine(dry=True, rounds=5)
    timer.dry = False
    assert timer.measure(lambda: None) == {"ms_median": 3, "ms_min": 1, "ms_iqr": 2}


def test_results_of_another_set_up_are_not_mixed_in(machine: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    ResultFile(path, machine).add([ROW.as_dict()])
    with pytest.raises(ValueError, match=r"another machine or version \(threads, commit differ\)"):
        ResultFile(path, {**machine, "threads": 1, "commit": "0" * 40})


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
    ("model", "limits", "name"),
    [
        ("AMD EPYC 7763 64-Core Processor", (), "epyc-2c"),
        ("Intel(R) Xeon(R) Platinum 8375C", ("avx2",), "xeon-2c-avx2"),
        ("Intel(R) Xeon(R) Platinum 8375C", ("portable", "avx2"), "xeon-2c-avx2-portable"),
        ("Something Else", ("portable",), "cpu-2c-portable"),
    ],
)
def test_device_names(model: str, limits: tuple[str, ...], name: str) -> None:
    assert device_name(model, 2, limits) == name


def test_the_variables_that_limit_the_software_name_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "GATEDCONV_ISA"):
        monkeypatch.delenv(name, raising=False)
    plain = machine_header(1)["device"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine_header(1)["device"] == f"{plain}-avx2"
    monkeypatch.setenv("GATEDCONV_ISA", "portable")
    assert machine_header(1)["device"] == f"{plain}-avx2-portable"
