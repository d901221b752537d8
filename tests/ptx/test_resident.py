"""nvcc's PTX of the image-resident driver, executed behind the engine's plans, with 1 to 8 blocks an image."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.engine.cuda import experimental
from tests.cuda import plans
from tests.cuda.gpu.test_sanitized import sanitized_network
from tests.cuda.test_resident import H100, Scattering
from tests.engine.nets import Residual, error, settle
from tests.ptx.resident import FORMS, Driver

# As in tests/cuda/test_resident.py; tf32 has no peer on a CPU.
FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 5e-3}


def check(monkeypatch, model, x, dtype, ranks, ledger=None, case="", **attributes):
    """The plan's error against float64 is at most twice PyTorch's, and nothing is noted. Returns the driver."""
    driver = Driver(seed=ranks)
    vars(driver).update(attributes)
    monkeypatch.setattr(experimental, "limits", lambda device, dtype: experimental.Limits(H100, (1, 2, 4, 8)))
    monkeypatch.setattr(experimental, "resident_run", driver.run)
    low, given = copy.deepcopy(model).to(dtype), x.to(dtype)
    tuner = plans.always(f"resident x{ranks}")
    mine = plans.make_plan(model, given, dtype=dtype, mode="experimental", tuner=tuner)(given)
    with torch.no_grad():
        theirs = low(given)
    assert driver.machines
    for machine in driver.machines:
        if ledger is not None:
            kind = "cluster" if ranks > 1 else "block"
            ledger.add(
                f"resident_kernel {FORMS[dtype]} {kind}",
                driver.architecture,
                kind,
                f"{case} {ranks}",
                machine.covered,
                machine.instructions,
            )
        assert not machine.notes, dict(machine.notes)
    assert error(mine, low, given) <= max(2 * error(theirs, low, given), FLOOR[dtype])
    return driver


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_kind_of_step(ranks, ledger, monkeypatch):
    check(monkeypatch, sanitized_network(), torch.randn(1, 3, 12, 12), torch.float16, ranks, ledger, "steps")


@pytest.mark.ptx_all
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", FORMS)
def test_every_format_and_cluster(ranks, dtype, ledger, monkeypatch):
    check(monkeypatch, sanitized_network(), torch.randn(1, 3, 12, 12), dtype, ranks, ledger, "steps")


def widths():
    """Networks whose convolutions take every tile that the library has code for."""
    yield "wide", nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(8, 96, 1), Residual(8, 24, 2)), 14
    yield "narrow", nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), Residual(5, 7, 1), nn.Conv2d(5, 33, 1)), 24
    yield "large", nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)), 32
    yield (
        "scatter",
        nn.Sequential(
            nn.Conv2d(3, 16, 1), Scattering(16, 9, True, True), Scattering(16, 5, False, False), nn.Conv2d(16, 4, 1)
        ),
        9,
    )
    yield "relu6", nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU6(), nn.Conv2d(40, 64, 3, 2), nn.ReLU6()), 16


@pytest.mark.ptx_all
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", ["wide", "narrow", "large", "scatter", "relu6"])
def test_tiles(name, ranks, ledger, monkeypatch):
    model, size = next((settle(model.eval()), size) for found, model, size in widths() if found == name)
    check(monkeypatch, model, torch.randn(1, 3, size, size), torch.float16, ranks, ledger, name)


@pytest.mark.ptx_all
@pytest.mark.parametrize(("position", "ranks"), [("middle", 1), ("after", 8)])
def test_a_resnet20_in_one_launch(position, ranks, ledger, monkeypatch):
    model = settle(gatedconv.models.resnet20(gate="channel", position=position))
    masks = {name: torch.rand(gate.num_gates) < 0.5 for name, gate in gatedconv.gates(model).items()}
    model = gatedconv.compact(gatedconv.freeze(model, masks=masks), torch.zeros(1, 3, 32, 32)).eval()
    check(monkeypatch, model, torch.randn(1, 3, 32, 32), torch.float16, ranks, ledger, f"resnet20 {position}")
