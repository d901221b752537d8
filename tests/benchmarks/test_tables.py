from __future__ import annotations

from typing import Any

from benchmarks.harness import read, result_files
from benchmarks.tables import cpu_section, gpu_section
from gatedconv.report.bench import Row
from gatedconv.report.runtimes import UNLIMITED_ISA


def row(**changes: Any) -> dict[str, Any]:
    given = {
        "benchmark": "network",
        "case": "resnet56 mid-50",
        "batch": 1,
        "dtype": "float32",
        "provider": "gatedconv",
        "setting": "Engine",
        "ms_median": 1.0,
        "ms_min": 0.9,
        "ms_iqr": 0.1,
        "rounds": 3,
        "ratio": None,
        "ratio_low": None,
        "ratio_high": None,
        "error": 1e-7,
    }
    return Row(**{**given, **changes}).as_dict()


def peer(median: float, ratio: float, **changes: Any) -> dict[str, Any]:
    given = {
        "provider": "onnxruntime",
        "setting": "all",
        "ms_median": median,
        "ratio": ratio,
        "ratio_low": ratio - 0.1,
        "ratio_high": ratio + 0.1,
    }
    return row(**{**given, **changes})


def results(*rows: dict[str, Any], **header: Any) -> dict[str, Any]:
    given = {
        "device": "epyc-2c",
        "cpu": "AMD EPYC",
        "isa": "AVX2",
        "threads": 2,
        "torch": "2.13.0",
        "triton": None,
        "cuda": None,
        "versions": {"onnxruntime": "1.2"},
        "commit": "0123456789abcdef",
        "date": "2026-11-22",
    }
    return {**given, **header, "rows": list(rows), "failures": header.get("failures", [])}


def line(section: str, start: str) -> list[str]:
    (found,) = (text for text in section.splitlines() if text.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_every_committed_file_is_complete() -> None:
    for path in result_files():
        found = read(path)
        assert "+changes" not in (found["commit"] or ""), f"{path}: measured on uncommitted code"
        assert path.name.startswith(found["device"])


def test_the_ratio_is_that_of_the_fastest_peer_and_goals_are_judged() -> None:
    section = cpu_section(
        [
            results(
                row(),
                peer(2.5, 2.4),
                peer(2.2, 2.1, provider="openvino"),
                peer(9.0, 8.9, provider="openvino", setting="slow"),
                row(batch=32),
                peer(1.2, 1.2, batch=32),
            )
        ]
    )
    assert line(section, "resnet56 mid-50 | 1")[2:] == [
        "1 (0.1)",
        "2.5 (0.1)",
        "2.2 (0.1)",
        "2.10 (2.00-2.20) OpenVINO",
        "2.0, met",
    ]
    assert line(section, "resnet56 mid-50 | 32")[2:] == [
        "1 (0.1)",
        "1.2 (0.1)",
        "-",
        "1.20 (1.10-1.30) ONNX Runtime",
        "1.4, missed",
    ]
    assert "OpenVINO slow (0)" in section and "ONNX Runtime all (2)" in section


def test_a_loss_is_shown() -> None:
    section = cpu_section([results(row(case="resnet18 dense"), peer(0.5, 0.5, case="resnet18 dense"))])
    assert line(section, "resnet18 dense | 1")[-2:] == ["0.50 (0.40-0.60) ONNX Runtime", "1.0, missed"]


def test_layers_are_compared_with_the_dense_convolution() -> None:
    name = "16->16 3x3 @32"
    section = cpu_section(
        [
            results(
                peer(2.0, 1.75, benchmark="layer", case=f"{name}, 50 % open", batch=8, provider="conv2d"),
                peer(0.1, 0.1, benchmark="layer", case=f"{name}, 50 % open", batch=8, provider="mkldnn"),
                peer(2.0, 0.9, benchmark="layer", case=f"{name}, 100 % open", batch=8, provider="conv2d"),
                peer(2.0, 0.8, benchmark="layer", case=f"{name}, 100 % open", batch=1, provider="conv2d"),
            )
        ]
    )
    assert line(section, f"{name} | 8")[2:] == ["-", "-", "1.75 (met)", "-", "0.90 (missed)", "-"]
    assert line(section, f"{name} | 1")[2:] == ["-", "-", "-", "-", "0.80", "-"]


def test_goals_are_summed_up_and_each_missed_one_is_named() -> None:
    rows = [row(), peer(2.2, 2.1), row(batch=32), peer(1.2, 1.2, batch=32)]
    section = cpu_section([results(*rows)])
    assert "**Goals.** 1 of 2 met. Missed:\n\n- resnet56 mid-50, batch 32: 1.20 of 1.4" in section
    assert "**Goals.** 1 of 1 met.\n" in cpu_section([results(*rows[:2])])
    assert "**Goals.**" not in cpu_section([results(row(batch=8), peer(1.2, 1.2, batch=8))])


def test_the_largest_error_is_ours() -> None:
    section = cpu_section([results(row(), row(batch=32, error=3e-6), peer(1.2, 1.2, error=9e-5))])
    assert "against eager PyTorch: 3.0e-06 (resnet56 mid-50, batch 32); 1e-5 is promised" in section


def test_who_is_not_held_back_is_shown_and_no_rival() -> None:
    rows = [row(), peer(0.5, 0.5, setting=f"all, {UNLIMITED_ISA}"), peer(2.2, 2.1, provider="openvino")]
    section = cpu_section([results(*rows, device="epyc-2c-avx2")])
    assert line(section, "resnet56 mid-50 | 1")[2:] == [
        "1 (0.1)",
        "0.5 (0.1)",
        "2.2 (0.1)",
        "2.10 (2.00-2.20) OpenVINO",
        "2.0, met",
    ]
    assert "limited to AVX2" in section and "limited to AVX2" not in cpu_section([results(*rows)])


def test_the_newest_file_of_each_device_is_shown() -> None:
    section = cpu_section(
        [
            results(row(), date="2026-11-22"),
            results(row(), date="2026-11-20", commit="f" * 40),
            results(row(), device="xeon-2c"),
        ]
    )
    assert section.count("### ") == 2 and "ffffffffff" not in section


def test_failures_are_printed() -> None:
    failure = {
        "benchmark": "network",
        "case": "net",
        "batch": 1,
        "provider": "openvino",
        "setting": "latency",
        "reason": "wrong output",
    }
    assert "net, batch 1, openvino (latency): wrong output" in cpu_section([results(failures=[failure])])


def test_gpu_rows_are_all_shown_with_their_failures() -> None:
    rows = [row(benchmark="parity", note="failed: error 1.0e-01", ms_median=None, ms_min=None), row(note="chosen")]
    section = gpu_section([results(*rows, device="h200", cuda="13.0", triton="3.6.0")])
    assert "### h200" in section and "CUDA 13.0" in section
    lines = [[cell.strip() for cell in text.strip("|").split("|")] for text in section.splitlines() if "mid-50" in text]
    assert lines[0][5:] == ["", "", "1.0e-07", "failed: error 1.0e-01"] and lines[1][5:7] == ["1.0000", "0.9000"]
    assert gpu_section([]) == "**Not measured yet on any GPU.**"
