"""The energy of epochs and runs: what several processes, restarts and silent counters make of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gatedconv.data import ImageData
from gatedconv.measure import energy as meters
from gatedconv.models.resnet import ResNet
from gatedconv.train import EpochMetrics, TrainConfig
from gatedconv.train.checkpoint import load_checkpoint
from gatedconv.train.metrics import Energy, added_energy, run_energy, total_energy
from tests.train.steps import train

LINE = EpochMetrics("gated", 1, 0.1, 1.0, 50.0, 1.0, 50.0, 1.0, energy_j=2.0, energy_source="GPU 0 (NVML)")


def test_all_devices_of_all_processes_are_named() -> None:
    host = Energy(5.0, "", "GPU 0 (NVML), CPU package-0 (RAPL)")
    found = total_energy([host, Energy(3.0, "", "GPU 1 (NVML)"), host, Energy(3.0, "", "GPU 1 (NVML)")])
    assert found == Energy(16.0, "", "2 x GPU 0 (NVML), 2 x CPU package-0 (RAPL), 2 x GPU 1 (NVML)")


def test_one_process_without_a_counter_makes_all_unknown_with_the_reason() -> None:
    found = total_energy([Energy(5.0, "", "GPU 0 (NVML)"), Energy(None, "NVML: Not Supported"), Energy()])
    assert found == Energy(None, "NVML: Not Supported", "GPU 0 (NVML)")


def test_what_was_unknown_before_a_restart_stays_unknown() -> None:
    now = Energy(5.0, "", "GPU 0 (NVML)")
    assert added_energy(Energy(), now) == now
    assert added_energy(Energy(None, "gone", "GPU 0 (NVML)"), now) == Energy(None, "gone", "GPU 0 (NVML)")
    assert added_energy(Energy(1.0, "", "CPU (RAPL)"), now) == Energy(6.0, "", "CPU (RAPL); then GPU 0 (NVML)")


def test_a_run_has_the_first_reason_of_its_epochs() -> None:
    silent = [dataclasses.replace(LINE, epoch=2, energy_j=None, energy_reason=reason) for reason in ("first", "next")]
    assert run_energy([LINE, LINE]) == Energy(4.0, "", "GPU 0 (NVML)")
    assert run_energy([LINE, *silent]) == Energy(None, "first", "GPU 0 (NVML)")
    old = dataclasses.replace(LINE, epoch=3, energy_j=None, energy_source="")  # of before lines carried a reason
    assert run_energy([LINE, old]) == Energy(None, "gated, epoch 3: not measured", "GPU 0 (NVML)")
    assert run_energy([old, *silent]).reason == "first"
    assert run_energy([]).joules is None and run_energy([]).reason


def test_a_shared_device_has_no_energy_and_gives_the_reason(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "find_counters", lambda device, host=True: ([Scripted(*range(1, 99))], ""))
    for shared, expected in ((False, (True, "", "fake")), (True, (False, meters.SHARED, ""))):
        config = TrainConfig(epochs=1, batch_size=16, gate="none", device="cpu", shared_device=shared)
        (line,) = train(ResNet(8, 3, None, input_size=(1, 8, 8)), data, config, checkpoint=tmp_path / f"{shared}.pt")
        assert (line.energy_j is not None, line.energy_reason, line.energy_source) == expected


class Scripted:
    name, span = "fake", None

    def __init__(self, *values: float | OSError) -> None:
        self.values = list(values)

    def read(self) -> float:
        value = self.values.pop(0)
        if isinstance(value, OSError):
            raise value
        return value


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [((1.0, 4.0), (9.0, 10.0, 11.0), (5.0, "")), ((1.0, OSError("gone")), (9.0, 10.0, 11.0), (None, "gone"))],
    ids=["known", "unknown"],
)
def test_the_energy_of_an_epoch_outlives_a_restart(
    tmp_path: Path,
    data: ImageData,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    expected: tuple[float | None, str],
) -> None:
    """A stop after the first of three steps; the reads are those of start, last step and end."""
    config, path = TrainConfig(epochs=1, batch_size=16, gate="none", device="cpu"), tmp_path / "gated.pt"
    for values, deadline in ((before, 0.0), (after, None)):
        counter = Scripted(*values)
        monkeypatch.setattr(meters, "find_counters", lambda device, host=True, c=counter: ([c], ""))
        torch.manual_seed(0)
        model = ResNet(8, 3, None, input_size=(1, 8, 8))
        lines = list(train(model, data, config, checkpoint=path, resume=path.exists(), deadline=deadline))
    assert load_checkpoint(path)["history"] == [line.as_dict() for line in lines]
    assert (lines[0].energy_j, lines[0].energy_reason, lines[0].energy_source) == (*expected, "fake")
