"""The roofline of training: what layers multiply and move, and what a device would take for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.roofline import DeviceRates, epoch_ms, layer_work, measured_rates, pass_ms
from gatedconv.models.resnet import ResNet


def test_work_is_that_of_convolutions_and_linear_layers() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    ).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert layer_work(net, torch.zeros(1, 3, 8, 8)) == [
        (27 * 8 * 16, 3 * 64 + 8 * 16, 27 * 8),
        (18 * 8 * 16, 2 * 8 * 16, 18 * 8),
        (1280, 128 + 10, 1280),
    ]
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_work_of_linear_layers_counts_every_position() -> None:
    assert layer_work(nn.Linear(3, 5), torch.zeros(1, 4, 6, 3)) == [(15 * 24, 24 * 3 + 24 * 5, 15)]


@pytest.mark.parametrize("gate", [None, "channel"])
def test_resnet56_has_its_known_macs(gate: str | None) -> None:
    net = ResNet(56, 10, gate, "middle", input_size=(3, 32, 32))
    assert sum(macs for macs, _, _ in layer_work(net, torch.zeros(1, 3, 32, 32))) == pytest.approx(125.75e6, rel=0.01)


def test_each_layer_takes_the_longer_of_multiplying_and_moving() -> None:
    rates = DeviceRates(flop_per_ms=100.0, bytes_per_ms=10.0)
    work = [(1000, 10, 5), (10, 1000, 5)]
    first, second = 2 * 2 * 1000 / 100, 4 * (2 * 1000 + 5) / 10
    assert pass_ms(work, 2, 4, rates) == pytest.approx(first + second)
    assert epoch_ms(work, 2, 7, 6, 4, rates) == pytest.approx((first + second) * (3 * 7 + 3))


def test_rates_are_measured() -> None:
    rates = measured_rates(torch.device("cpu"), torch.float32, 64)
    assert rates.flop_per_ms > 0 and rates.bytes_per_ms > 0
