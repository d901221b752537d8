"""The benchmark of the networks that people ship: its file, that it continues, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import shipped
from tests.tolerances import tolerance


def test_a_case_is_measured_kept_and_not_measured_twice(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    path, lines = tmp_path / "shipped-here.json", []
    options = ["--size=32", "--rounds=1", "--threads=1", "--only=resnet18 dense", f"--out={path}"]
    shipped.main(options, lines.append)
    found = json.loads(path.read_text())
    cases = {(row["case"], row["batch"]) for row in found["rows"]}
    assert cases == {("resnet18 dense", 1), ("resnet18 dense", 8)} and not found["failures"]
    assert {row["provider"] for row in found["rows"]} == {"gatedconv", "onnxruntime", "openvino"}
    own = [row for row in found["rows"] if row["provider"] == "gatedconv"]
    assert all(row["gflops"] > 0 and row["share_of_peak"] > 0 and row["error"] <= tolerance() for row in own)
    layers = found["layers"]["resnet18 dense"]
    assert len(layers) == shipped.SLOWEST
    assert [layer["ms"] for layer in layers] == sorted((layer["ms"] for layer in layers), reverse=True)
    before = path.read_bytes()
    shipped.main(options, lines.append)
    assert path.read_bytes() == before and len(lines) == 2


def test_results_of_another_machine_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "shipped-there.json"
    path.write_text(json.dumps({"machine": {"cpu": "another"}, "rows": [], "failures": [], "layers": {}}))
    with pytest.raises(ValueError, match="another machine"):
        shipped.ResultFile(path, {"cpu": "this"})


def test_the_table_compares_with_the_fastest_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(provider: str, setting: str, ms: float, **more: float) -> dict[str, object]:
        fields = {"benchmark": "network", "case": "resnet18 dense", "batch": 1, "dtype": "float32"}
        return {**fields, "provider": provider, "setting": setting, "ms_min": ms, "ms_median": 2 * ms, **more}

    machine = {
        "device": "a",
        "cpu": "a CPU",
        "isa": "AVX2",
        "threads": 2,
        "size": 224,
        "torch": "2",
        "versions": {},
        "commit": "c" * 40,
    }
    found = {
        "machine": {**machine, "date": "2026-01-02T03:04Z", "peak_gflops": 100.0},
        "rows": [
            row("gatedconv", "Engine", 2.0, gflops=50.0, share_of_peak=0.5),
            row("onnxruntime", "slow", 9.0),
            row("onnxruntime", "all", 3.0),
            row("openvino", "latency", 4.0),
        ],
        "failures": [],
        "layers": {},
    }
    (tmp_path / "shipped-a.json").write_text(json.dumps(found))
    monkeypatch.setattr(shipped, "RESULTS", tmp_path)
    text = shipped.section()
    assert "| resnet18 dense | 1 | 2.00 (4.00) | 3.00 (6.00) | 4.00 (8.00) | 1.50 | 50 | 50% |" in text
    assert "fastest in 1 of 1 rows; geometric mean of fastest peer / ours 1.50" in text
    assert "MNN, ncnn and LiteRT are not measured yet" in text and "MNN |" not in text
    assert text.endswith("**Any precision.** Not measured yet.")
    few = [row("gatedconv", "Engine", 2.0, gflops=50.0, share_of_peak=0.5), row("openvino", "latency", 5.0)]
    small = {**found, "machine": {**found["machine"], "group": "small", "size": 32}}
    small["rows"] = [{**each, "case": "resnet56 mid-50", "batch": 32} for each in few]
    (tmp_path / "shipped-a-small.json").write_text(json.dumps(small))
    assert "| resnet56 mid-50 | 32 | 2.00 (4.00) | 5.00 (10.00) | 2.50 | 50 | 50% |" in shipped.section()
    assert "32 x 32" in shipped.section() and "224 x 224" in shipped.section()

    def also(group: str, rows: list[dict[str, object]], failures: list[dict[str, object]]) -> None:
        more = {**found, "machine": {**found["machine"], "group": group}, "rows": rows, "failures": failures}
        (tmp_path / f"shipped-a-{group}.json").write_text(json.dumps(more))

    missing = {"case": "resnet18 dense", "provider": "ncnn", "setting": "float32", "reason": "not installed"}
    lacking = [{**missing, "batch": batch, "case": name} for name in ("a", "b") for batch in (1, 8)]
    also("mobile", [row("gatedconv", "Engine", 4.0), row("mnn", "high", 5.0)], lacking)
    reduced = {**row("onnxruntime", "int8", 1.0, error=0.0123, agreement=0.75), "dtype": "int8"}
    half = {**row("gatedconv", "Engine, bf16", 0.5, error=0.001, agreement=1.0), "dtype": "bfloat16"}
    also("reduced", [row("gatedconv", "Engine", 4.0), half, reduced], [])
    text = shipped.section()
    # Of interleaved calls: MNN's 5.0 over the 4.0 of its own run.
    assert "| 2.00 (4.00) | 3.00 (6.00) | 4.00 (8.00) | 5.00 (10.00) | 1.25 | 50 | 50% |" in text
    assert "- ncnn, float32: not installed (4 cases)" in text and "ot measured yet" not in text
    own = "| 4.00 (8.00) | 0.50 (1.00) | 1.0e-03, 100% |"
    assert f"{own} 1.00 (2.00) | 1.2e-02, 75% | - | - | - | - | 0.25 | 2.00 |" in text
    assert "fastest in 0 of 1 rows, geometric mean 0.25" in text


def test_the_readme_has_a_line_for_each_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(case: str, provider: str, ms: float, dtype: str = "float32") -> dict[str, object]:
        fields = {"benchmark": "network", "case": case, "batch": 1, "dtype": dtype, "provider": provider}
        return {**fields, "setting": "", "ms_min": ms, "ms_median": ms}

    monkeypatch.setattr(shipped, "RESULTS", tmp_path)
    assert shipped.headline() == "Not measured yet."
    cpu = "Intel(R) Xeon(R) Processor (family/model 6/167)"
    machine = {"cpu": cpu, "isa": "AVX512", "threads": 2, "size": 224}
    cases = [("resnet18 dense", 3.0), ("resnet50 dense", 1.5), ("resnet18 mid-50", 5.0)]
    rows = [each for case, ms in cases for each in (row(case, "gatedconv", 2.0), row(case, "openvino", ms))]
    (tmp_path / "shipped-a.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    assert "| Intel Xeon, AVX-512, 2 threads | 2 of 3 | 1.06 | 2.50 | - | - |" in shipped.headline()
    few = [row("resnet18 dense", "gatedconv", 2.0), row("resnet18 dense", "openvino", 1.0, "int8")]
    reduced = {"machine": {**machine, "group": "reduced"}, "rows": few}
    (tmp_path / "shipped-a-reduced.json").write_text(json.dumps(reduced))
    assert "| 2 of 3 | 1.06 | 2.50 | 0.50 (1 network) | - |" in shipped.headline()
