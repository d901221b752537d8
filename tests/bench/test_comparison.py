from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gatedconv
from gatedconv.bench import exported, runtimes
from gatedconv.bench.comparison import Comparison, Row, bench_table, best_rows, compare_runtimes
from gatedconv.bench.exported import made_once, onnx_file
from gatedconv.bench.runtimes import OURS, REDUCED, SETTINGS, Setting, fingerprint
from tests.tolerances import tolerance

OUT = torch.tensor([1.0, 2.0])


def comparison(**outputs: Tensor | Exception) -> Comparison:
    """One candidate per name; each returns its tensor, or raises while it is prepared."""

    def builder(output: Tensor | Exception) -> object:
        def build() -> object:
            if isinstance(output, Exception):
                raise output
            return lambda: output

        return build

    candidates = {(name, "only"): builder(output) for name, output in outputs.items()}
    return Comparison("network", "net", 2, candidates, dict.fromkeys(candidates, OUT), sample_ms=0, wait=False)


def row(**changes: object) -> Row:
    given = {
        "benchmark": "network",
        "case": "net",
        "batch": 1,
        "dtype": "float32",
        "provider": "eager",
        "setting": "NCHW",
        "ms_median": 2.0,
        "ms_min": 1.5,
        "ms_iqr": 0.25,
        "rounds": 3,
        "ratio": 2.0,
        "ratio_low": 1.5,
        "ratio_high": 2.5,
        "error": 1e-7,
    }
    return Row(**{**given, **changes})


def test_what_is_wrong_is_reported_and_not_timed() -> None:
    found = comparison(
        right=OUT.clone(),
        close=OUT + 1e-5,
        off=OUT * 1.001,
        nan=torch.tensor([1.0, float("nan")]),
        short=OUT[:1],
        broken=RuntimeError("no such\nthing"),
    )
    assert list(found.errors) == [("right", "only"), ("close", "only")] == list(found.timing.candidates)
    assert found.errors["right", "only"] == 0 and 0 < found.errors["close", "only"] < 1e-4
    assert set(found.failures) == {(name, "only") for name in ("off", "nan", "short", "broken")}
    assert found.failures["broken", "only"] == "RuntimeError: no such thing"
    assert "wrong output: relative error 1.0e-03" in found.failures["off", "only"]


def test_nothing_that_runs_is_an_error() -> None:
    with pytest.raises(ValueError, match="net: nothing could be run; ValueError: bad"):
        comparison(only=ValueError("bad"))


def test_rows_compare_with_the_fastest_of_ours() -> None:
    candidates = {("gatedconv", "a"): 0, ("gatedconv", "b"): 0, ("eager", "NCHW"): 0}
    found = Comparison(
        "network",
        "net",
        2,
        {name: lambda: lambda: OUT for name in candidates},
        dict.fromkeys(candidates, OUT),
        sample_ms=0,
        wait=False,
    )
    found.rounds(3)
    found.timing.samples = {
        ("gatedconv", "a"): [3.0, 3.0, 3.0],
        ("gatedconv", "b"): [1.0, 2.0, 4.0],
        ("eager", "NCHW"): [2.0, 6.0, 20.0],
    }
    rows = {(r.provider, r.setting): r for r in found.rows()}
    assert found.ours == ("gatedconv", "b")
    assert rows["gatedconv", "a"].ratio is None and rows["gatedconv", "b"].ratio is None
    peer = rows["eager", "NCHW"]
    assert (peer.ratio, peer.ratio_low, peer.ratio_high) == (3, 2.5, 4)  # of the pairs 2, 3, 5
    assert (peer.ms_median, peer.ms_iqr, peer.rounds, peer.batch, peer.dtype) == (6, 9, 3, 2, "float32")


def test_no_ratio_without_ours() -> None:
    found = comparison(eager=OUT.clone())
    found.rounds(2)
    assert [r.ratio for r in found.rows()] == [None]


def test_best_rows_keep_the_fastest_setting_of_each_provider() -> None:
    rows = [row(setting="a", ms_median=3.0), row(setting="b"), row(provider="openvino"), row(batch=8, ms_median=9.0)]
    assert best_rows([row(setting="a", ms_min=1.4, ms_median=9.0), row()], "ms_min")[0].setting == "a"
    assert [(r.provider, r.setting, r.batch) for r in best_rows(rows)] == [
        ("eager", "b", 1),
        ("openvino", "NCHW", 1),
        ("eager", "NCHW", 8),
    ]


def test_the_table_has_ratios_of_the_fastest_calls_wins_and_losses_alike() -> None:
    ours = [row(provider="gatedconv", setting=name, ms_min=ms, ratio=None) for name, ms in (("a", 1.0), ("b", 0.75))]
    peers = [row(ms_median=1.75), row(provider="openvino", ms_min=0.5, ms_median=0.5), row(batch=8, ms_min=1.6)]
    lines = bench_table([*ours, *peers]).splitlines()
    assert [line.split()[-1] for line in lines[4:6]] == ["2.00x", "0.67x"]
    assert not any(line.endswith("x") for line in [*lines[2:4], lines[6]])


def test_a_disturbed_measurement_is_reported_in_a_line() -> None:
    rows = [row(ms_min=1.0, ms_median=1.2), row(provider="openvino", ms_min=1.0, ms_median=2.5), row(ms_min=1.5)]
    line = bench_table(rows).splitlines()[-1]
    assert line.startswith("disturbed: the median is more than 1.3 times the minimum in 2 of 3 rows")
    assert "most in net, batch 1, openvino (2.5 times)" in line
    assert "disturbed" not in bench_table(rows[:1])


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def compacted() -> nn.Module:
    torch.manual_seed(0)
    network = gatedconv.models.ResNet(8, gate="channel", input_size=(3, 8, 8)).eval()
    masks = {name: torch.arange(gate.num_gates) % 3 == 0 for name, gate in gatedconv.gates(network).items()}
    return gatedconv.compact(gatedconv.freeze(network, masks=masks), torch.zeros(1, 3, 8, 8)).eval()


def chosen(*names: str) -> list[Setting]:
    return [setting for setting in SETTINGS if setting.name in names]


def test_files_that_were_not_finished_are_made_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "network.xml", []

    def make(part: Path) -> None:
        part.write_text("graph")
        calls.append(part)
        if len(calls) == 1:
            raise RuntimeError("no room")
        part.with_suffix(".bin").write_text("weights")

    with pytest.raises(RuntimeError, match="no room"):
        made_once(path, make, ".bin")
    assert not path.exists()
    assert made_once(path, make, ".bin") == made_once(path, make, ".bin") == path
    assert len(calls) == 2 and sorted(file.name for file in tmp_path.iterdir()) == ["network.bin", "network.xml"]


def test_every_quick_setting_computes_a_compact_network(compacted: nn.Module, tmp_path: Path) -> None:
    settings = [s for s in SETTINGS if s.provider in (OURS, "eager", "onnxruntime", "openvino") and s.missing is None]
    found = compare_runtimes(
        "compacted", compacted, torch.randn(4, 3, 8, 8), settings=settings, folder=tmp_path, threads=2
    )
    assert not found.failures
    assert {(s.provider, s.label) for s in settings} == set(found.errors)
    assert {"eager", "onnxruntime"} <= {provider for provider, _ in found.errors}


@pytest.mark.parametrize("provider", ["mnn", "ncnn", "litert"])
@pytest.mark.parametrize("batch", [1, 3])
def test_runtimes_made_for_phones_compute_a_network(small: nn.Module, provider: str, batch: int) -> None:
    settings = [s for s in SETTINGS if s.provider == provider]
    if settings[0].missing:
        pytest.skip(settings[0].missing)
    found = compare_runtimes("small", small, torch.randn(batch, 3, 8, 8), settings=settings, threads=1, sample_ms=0)
    assert not found.failures and all(error <= tolerance() for error in found.errors.values())


def test_reduced_precision_is_reported_with_its_error_and_not_refused(small: nn.Module) -> None:
    settings = [s for s in REDUCED if s.missing is None and s.dtype == "int8"]
    if not settings:
        pytest.skip("neither ONNX Runtime nor NNCF")
    network, x = nn.Sequential(small, nn.Softmax(1)), torch.randn(2, 3, 8, 8)
    found = compare_runtimes("small", network, x, settings=[*chosen("Engine"), *settings], threads=1, sample_ms=0)
    found.rounds(1)
    rows = {(row.provider, row.dtype): row for row in found.rows()}
    assert not found.failures and rows.keys() == {(OURS, "float32"), *((s.provider, s.dtype) for s in settings)}
    assert rows.pop((OURS, "float32")).agreement is None
    assert all(1e-4 < row.error < 0.5 and 0.5 < row.agreement <= 1 for row in rows.values())
    text = bench_table(found.rows())
    assert "same top-1" in text and "int8" in text


def test_a_reduced_setting_that_fails_on_other_images_is_reported_and_the_others_stay(small: nn.Module) -> None:
    def prepare(network: nn.Module, x: torch.Tensor, folder: Path, threads: int) -> Callable[[], torch.Tensor]:
        if len(x) != 2:
            raise RuntimeError("no such\nbatch")
        return lambda: network(x)

    settings = [*chosen("NCHW"), Setting("peer", "half", prepare, dtype="int8")]
    found = compare_runtimes("small", small, torch.randn(2, 3, 8, 8), settings=settings, threads=1, sample_ms=0)
    found.rounds(1)
    assert [row.provider for row in found.rows()] == ["eager"]
    assert found.failures == {("peer", "half"): "RuntimeError: no such batch"}


def test_an_output_that_has_nothing_to_do_with_it_is_refused_in_every_precision() -> None:
    candidates = {("peer", "int8"): lambda: lambda: OUT * 100}
    with pytest.raises(ValueError, match="wrong output"):
        Comparison("network", "net", 2, candidates, {("peer", "int8"): OUT}, {("peer", "int8"): "int8"}, wait=False)


@pytest.mark.parametrize(
    "label", ["freezing, channels_last", pytest.param("AOTInductor, freezing, channels_last", marks=pytest.mark.slow)]
)
def test_compiled_settings_compute_the_network(small: nn.Module, label: str) -> None:
    settings = [s for s in SETTINGS if s.provider == "compile" and s.label == label]
    found = compare_runtimes("small", small, torch.randn(2, 3, 8, 8), settings=settings, threads=1)
    assert not found.failures and found.errors.keys() == {("compile", label)}


def test_a_batch_that_cannot_be_halved_has_no_split_settings(small: nn.Module) -> None:
    for batch, threads in ((1, 2), (3, 2), (2, 1)):
        found = compare_runtimes(
            "small",
            small,
            torch.randn(batch, 3, 8, 8),
            settings=[*chosen("NCHW"), *chosen("two sessions")],
            threads=threads,
        )
        assert set(found.errors) == {("eager", "NCHW")} and not found.failures


def test_prepared_files_are_kept_by_network(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(1, 3, 8, 8)
    compare_runtimes("small", small, x, settings=chosen("all optimizations"), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [fingerprint(small, x)]
    monkeypatch.setattr(exported, "export", lambda *args: pytest.fail("exported again"))
    compare_runtimes("small", small, torch.randn(2, 3, 8, 8), settings=chosen("all optimizations"), folder=tmp_path)
    other = nn.Sequential(*small[:-1], nn.Linear(180, 4)).eval()
    assert fingerprint(other, x) != fingerprint(small, x) != fingerprint(small, torch.randn(1, 3, 8, 9))


def test_a_network_that_does_not_fit_is_an_error(small: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"small: the network does not accept \(1, 2, 8, 8\): .*channels"):
        compare_runtimes("small", small, torch.randn(1, 2, 8, 8), settings=chosen("NCHW"))

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="returns one tensor, got tuple"):
        compare_runtimes("pair", Pair(), torch.randn(1, 2, 8, 8), settings=chosen("NCHW"))


def test_a_missing_runtime_is_reported(small: nn.Module) -> None:
    absent = Setting("tensorrt", "best", lambda *args: pytest.fail("prepared"), needs=("no_such_runtime",))
    found = compare_runtimes("small", small, torch.randn(1, 3, 8, 8), settings=[*chosen("NCHW"), absent])
    assert "no_such_runtime not installed" in found.failures["tensorrt", "best"]
    assert set(found.errors) == {("eager", "NCHW")}


def test_openvino_is_held_to_float32(small: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    x = torch.randn(2, 3, 8, 8)
    compiled = runtimes._openvino_model(onnx_file(small, x, tmp_path), x.shape, 1)
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_under_an_instruction_set_limit_onnxruntime_is_marked_as_unlimited(
    small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = compare_runtimes(
        "small", small, torch.randn(1, 3, 8, 8), settings=chosen("all optimizations", "NCHW"), sample_ms=1
    )
    assert set(found.errors) == {("onnxruntime", f"all optimizations, {runtimes.UNLIMITED_ISA}"), ("eager", "NCHW")}
