"""Energy from counters that count, restart, fail, do not move or do not exist."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gatedconv.measure import energy
from gatedconv.measure.energy import EnergyMeter, NvmlCounter, RaplCounter, find_counters

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Counter:
    def __init__(self, *values: float | Exception, span: float | None = None, name: str = "fake") -> None:
        self.values, self.span, self.name = list(values), span, name

    def read(self) -> float:
        value = self.values.pop(0)
        if isinstance(value, Exception):
            raise value
        return value


def measured(*counters: Counter, polls: int = 0) -> EnergyMeter:
    meter = EnergyMeter(CPU, counters=counters)
    meter.start()
    for _ in range(polls):
        meter.poll()
    return meter


def zone(folder: Path, number: str, name: str, joules: float, span: float = 100.0) -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (path / "max_energy_range_uj").write_text(f"{int(span * 1e6)}\n")
    return path


def test_joules_are_differences_added_over_the_counters() -> None:
    meter = measured(Counter(10, 12.5), Counter(3, 4, name="other"))
    assert meter.joules() == pytest.approx(3.5) and meter.source == "fake, other" and not meter.reason


def test_a_counter_that_starts_over_is_followed_every_time() -> None:
    meter = measured(Counter(90, 10, 95, 5, 30, span=100.0), polls=3)
    assert meter.joules() == pytest.approx(20 + 85 + 10 + 25)


def test_a_meter_counts_anew_after_start() -> None:
    meter = measured(Counter(1, 5, 9, 10))
    assert meter.joules() == pytest.approx(4)
    meter.start()
    assert meter.joules() == pytest.approx(1)


@pytest.mark.parametrize("values", [(PermissionError(13, "Permission denied", "energy_uj"),), (1.0, OSError("gone"))])
def test_a_counter_that_cannot_be_read_is_no_zero(values: tuple[Any, ...]) -> None:
    meter = measured(Counter(*values))
    assert meter.joules() is None and meter.reason in ("energy_uj: Permission denied", "gone")
    assert meter.joules() is None  # and stays so


def test_a_counter_that_failed_once_is_read_again_after_the_next_start() -> None:
    """An epoch too short for the counter, or a read that failed, is no verdict on the whole run."""
    meter = measured(Counter(7, 7, 7, 9, OSError("gone"), 10, 14))
    assert meter.joules() is None and meter.reason == "fake: the counter does not move"
    meter.start()
    assert meter.joules() == pytest.approx(2) and not meter.reason
    meter.start()
    assert meter.joules() is None and meter.reason == "gone"
    meter.start()
    assert meter.joules() == pytest.approx(4)


def test_a_counter_that_does_not_move_is_not_zero() -> None:
    meter = measured(Counter(7, 7))
    assert meter.joules() is None and meter.reason == "fake: the counter does not move"


@pytest.mark.parametrize("order", [1, -1])
def test_one_of_two_counters_that_does_not_move_is_not_zero(order: int) -> None:
    """The package's joules alone would pass for those of the GPU too."""
    counters = [Counter(7, 7, 7, name="GPU 0 (NVML)"), Counter(1, 2, 4, name="CPU package-0 (RAPL)")]
    meter = measured(*counters[::order], polls=1)
    assert meter.joules() is None and meter.reason == "GPU 0 (NVML): the counter does not move"
    backwards = measured(Counter(9, 8, name="falling"), Counter(1, 5))
    assert backwards.joules() is None and backwards.reason == "falling: the counter does not move"


def test_a_counter_that_moved_early_and_then_rested_counts() -> None:
    meter = measured(Counter(0, 2, 2), Counter(0, 0, 3, name="other"), polls=1)
    assert meter.joules() == pytest.approx(5) and not meter.reason


def test_a_counter_read_too_early_continues() -> None:
    """A checkpoint within an epoch asks too, maybe before a counter has moved."""
    meter = measured(Counter(7, 7, 9))
    assert meter.joules() is None and meter.reason == "fake: the counter does not move"
    assert meter.joules() == pytest.approx(2) and not meter.reason


def test_no_counter_is_no_zero() -> None:
    meter = measured()
    assert meter.joules() is None and meter.reason == "no energy counter"


def test_rapl_counts_packages_and_memory_and_nothing_twice(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 5.0, span=262.144)
    zone(tmp_path, "0:0", "core", 4.0)
    zone(tmp_path, "0:1", "dram", 1.0)
    zone(tmp_path, "1", "psys", 99.0)
    counters, reason = find_counters(CPU, powercap=tmp_path)
    assert [counter.name for counter in counters] == ["CPU package-0 (RAPL)", "CPU dram (RAPL)"] and not reason
    assert [counter.read() for counter in counters] == [5.0, 1.0] and counters[0].span == pytest.approx(262.144)


def test_memory_without_a_meter_is_left_out_and_a_package_is_not(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 5.0)
    zone(tmp_path, "0:0", "dram", 0.0)
    assert [counter.name for counter in find_counters(CPU, powercap=tmp_path)[0]] == ["CPU package-0 (RAPL)"]
    zone(tmp_path, "1", "package-1", 0.0)
    assert EnergyMeter(CPU, counters=find_counters(CPU, powercap=tmp_path)[0]).source.endswith("CPU package-1 (RAPL)")


def test_a_machine_without_rapl_or_with_a_part_of_it_gives_the_reason(tmp_path: Path) -> None:
    assert find_counters(CPU, powercap=tmp_path / "none") == ([], f"no RAPL zones in {tmp_path / 'none'}")
    zone(tmp_path, "0", "package-0", 5.0)
    (zone(tmp_path, "1", "package-1", 5.0) / "energy_uj").unlink()
    counters, reason = find_counters(CPU, powercap=tmp_path)
    assert counters == [] and "energy_uj: No such file" in reason
    assert find_counters(CPU, host=False, powercap=tmp_path)[0] == []


def test_a_damaged_rapl_file_is_a_reason(tmp_path: Path) -> None:
    path = zone(tmp_path, "0", "package-0", 5.0)
    (path / "energy_uj").write_text("what?\n")
    with pytest.raises(ValueError):
        RaplCounter(path)
    assert find_counters(CPU, powercap=tmp_path)[0] == []


class NVMLError(Exception):
    pass


def nvml(energy_mj: Any = 1500) -> SimpleNamespace:
    asked: list[bytes] = []

    def read(handle: str) -> int:
        if isinstance(energy_mj, Exception):
            raise energy_mj
        return int(energy_mj)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        asked=asked,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=read,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="12345678-ab"))


def test_a_gpu_is_found_by_its_identity_and_read_in_joules(gpu: None) -> None:
    library = nvml()
    counter = NvmlCounter(GPU, library)
    assert library.asked == [b"GPU-12345678-ab"] and counter.read() == 1.5 and counter.span is None


def test_a_gpu_without_a_counter_is_not_measured_by_the_cpu_alone(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "0", "package-0", 5.0)
    with pytest.raises(OSError, match="NVML: Not Supported"):
        NvmlCounter(GPU, nvml(NVMLError("Not Supported")))
    monkeypatch.setattr(energy.importlib, "import_module", lambda name: nvml(NVMLError("Not Supported")))
    assert find_counters(GPU, powercap=tmp_path) == ([], "NVML: Not Supported")


def test_a_missing_package_is_named(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(energy.importlib, "import_module", missing)
    assert find_counters(GPU, powercap=tmp_path) == ([], "NVML: needs pip install 'gatedconv[energy]'")


def test_energy_of_a_call_is_the_total_over_the_calls() -> None:
    calls: list[int] = []
    meter = EnergyMeter(CPU, counters=[Counter(5.0, 7.0)])
    joules = energy.energy_per_call(lambda: calls.append(1), meter, seconds=0.01)
    assert joules == pytest.approx(2.0 / (len(calls) - 1)) and len(calls) > 10
    assert energy.energy_per_call(lambda: calls.append(1), EnergyMeter(CPU, counters=[])) is None


def test_bench_reports_that_nothing_can_be_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gatedconv
    from gatedconv.cli import main

    gatedconv.save(gatedconv.models.resnet20(input_size=(1, 8, 8)).eval(), tmp_path / "net.safetensors")
    flags = ["--batch", "1", "--rounds", "1", "--peers", "none", "--energy"]
    monkeypatch.setattr(energy, "find_counters", lambda device, host=True: ([], "no RAPL zones"))
    assert main(["bench", str(tmp_path / "net.safetensors"), *flags]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == "energy of one call, net, batch 1, eager: not measurable here: no RAPL zones"
    monkeypatch.setattr(energy, "find_counters", lambda device, host=True: ([Counter(1.0, 3.0, name="CPU")], ""))
    assert main(["bench", str(tmp_path / "net.safetensors"), *flags]) == 0
    assert capsys.readouterr().out.strip().endswith(" J (CPU)")
