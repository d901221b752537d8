"""nvcc's PTX of the image-resident driver, executed behind the engine's plans, with 1 to 8 blocks an image."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from gatedconv.engine.cuda import resident
from gatedconv.engine.cuda.resident import TILES
from tests.cuda import plans
from tests.cuda.gpu.test_sanitized import sanitized_network
from tests.cuda.test_resident import FLOOR, H100, Scattering
from tests.engine.nets import Residual, error, settle
from tests.ptx.resident import FORMS, Driver


def check(monkeypatch, model, x, dtype, ranks, **attributes):
    """The plan's error against float64 is at most twice PyTorch's, and nothing is noted. Returns the driver."""
    driver = Driver(seed=ranks)
    vars(driver).update(attributes)
    monkeypatch.setattr(resident, "limits", lambda device, dtype: resident.Limits(H100, (1, 2, 4, 8)))
    monkeypatch.setattr(resident, "resident_run", driver.run)
    low, given = copy.deepcopy(model).to(dtype), x.to(dtype)
    tuner = plans.always(f"resident x{ranks}")
    mine = plans.make_plan(model, given, dtype=dtype, mode="experimental", tuner=tuner)(given)
    with torch.no_grad():
        theirs = low(given)
    assert driver.machines
    for machine in driver.machines:
        assert not machine.notes, dict(machine.notes)
    assert error(mine, low, given) <= max(2 * error(theirs, low, given), FLOOR[dtype])
    return driver


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_kind_of_step(ranks, monkeypatch):
    check(monkeypatch, sanitized_network(), torch.randn(1, 3, 12, 12), torch.float16, ranks)


@pytest.mark.ptx_all
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", FORMS)
def test_every_format_and_cluster(ranks, dtype, monkeypatch):
    check(monkeypatch, sanitized_network(), torch.randn(1, 3, 12, 12), dtype, ranks)


class Added(nn.Module):
    """relu6(x + a convolution of x), in all channels or in some."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.part = nn.Conv2d(channels, count, 1)
        index = torch.randperm(channels)[:count].sort().values
        self.scatter = gatedconv.nn.ScatterAdd(index) if count < channels else torch.add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(self.scatter(x, self.part(x)))


def every_tile() -> tuple[nn.Module, list[tuple[int, int]]]:
    """A network with two convolutions for each of `TILES`, the large ones on large maps; and the tiles in order."""
    layers, order = [nn.Conv2d(3, 32, 3, padding=1)], [TILES[-1]]
    for tile in reversed(TILES):
        if tile == (2, 4):
            layers.append(nn.Conv2d(32, 32, 1, 2))
            order.append(tile)
        layers += [Added(32, 32), Added(32, 25)]
        order += [tile, tile]
    return settle(nn.Sequential(*layers)), order


def check_tiles(monkeypatch, dtype, ranks, architecture):
    """Every tile in turn, whatever the plan would choose; 12 x 12 pixels fill the largest."""
    model, order = every_tile()
    tiles = itertools.cycle(order)

    def choose(fragments, blocks):
        mt, nt = next(tiles)
        groups = -(-blocks // nt)
        return resident.Tile(mt, nt, groups, -(-fragments // (resident.WARPS // groups * mt)))

    monkeypatch.setattr(resident, "choose_tile", choose)
    x = 3 * torch.randn(1, 3, *(12, 12) if ranks == 1 else (16, 16))
    check(monkeypatch, model, x, dtype, ranks, architecture=architecture)


@pytest.mark.slow
def test_every_tile(monkeypatch):
    check_tiles(monkeypatch, torch.float16, 1, 90)


@pytest.mark.ptx_all
@pytest.mark.parametrize(
    ("dtype", "ranks", "architecture"),
    [*itertools.product(FORMS, (1, 2), (90,)), *itertools.product(FORMS, (1,), (80,)), (torch.float16, 1, 75)],
)
def test_every_tile_of_every_format(dtype, ranks, architecture, monkeypatch):
    check_tiles(monkeypatch, dtype, ranks, architecture)


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
def test_tiles(name, ranks, monkeypatch):
    model, size = next((settle(model.eval()), size) for found, model, size in widths() if found == name)
    check(monkeypatch, model, torch.randn(1, 3, size, size), torch.float16, ranks)


@pytest.mark.ptx_all
@pytest.mark.parametrize(("position", "ranks"), [("middle", 1), ("after", 8)])
def test_a_resnet20_in_one_launch(position, ranks, monkeypatch):
    model = settle(gatedconv.models.resnet20(gate="channel", position=position))
    masks = {name: torch.rand(gate.num_gates) < 0.5 for name, gate in gatedconv.gates(model).items()}
    model = gatedconv.compact(gatedconv.freeze(model, masks=masks), torch.zeros(1, 3, 32, 32)).eval()
    check(monkeypatch, model, torch.randn(1, 3, 32, 32), torch.float16, ranks)
