from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import masked_conv2d, networks
from benchmarks.networks import NetworkCase
from gatedconv.bench.conv_case import ConvCase, compare_layers


def test_names_of_cases_are_unique() -> None:
    for cases in (networks.CASES, masked_conv2d.CASES):
        assert len({(case.name, case.batch) for case in cases}) == len(cases)


def test_the_same_network_every_time() -> None:
    case = NetworkCase("resnet56", "mid-50", 2)
    (first, x), (second, y) = case.build(), case.build()
    assert torch.equal(x, y) and x.shape == (2, 3, 32, 32)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_half_of_the_channels_are_left() -> None:
    def convolutions(model: str, variant: str) -> list[nn.Conv2d]:
        network, _ = NetworkCase(model, variant, 1).build()
        return [module for module in network.modules() if isinstance(module, nn.Conv2d)]

    dense, middle = convolutions("resnet56", "dense"), convolutions("resnet56", "mid-50")
    inner = [(a.out_channels, b.out_channels) for a, b in zip(dense, middle, strict=True)]
    assert sum(b * 2 == a for a, b in inner) == 27 and all(b in (a, a // 2) for a, b in inner)
    # 27 blocks of two convolutions, a stem and two projections: 14 blocks stay.
    assert len(dense) == 57 and len(convolutions("resnet56", "half the blocks")) == 2 * 14 + 3
    wide, narrow = convolutions("resnet50", "dense"), convolutions("resnet50", "mid-50")
    halved = sum(b.out_channels * 2 == a.out_channels for a, b in zip(wide, narrow, strict=True))
    assert halved == 2 * 16 + 1  # the stem, too


@pytest.mark.parametrize(("share", "count"), [(0, 0), (25, 8), (50, 16), (100, 32), ("odd", 15)])
def test_open_counts(share: int | str, count: int) -> None:
    case = ConvCase.parse(f"i16 o32 h32 k3 s2 open{share}")
    assert case.open_count == count == int(case.mask().sum())


@pytest.mark.parametrize("share", [0, "odd", 100])
def test_every_way_to_compute_a_layer_is_right(share: int | str) -> None:
    comparison = compare_layers(ConvCase.parse(f"n2 i3 o8 h7 k3 s2 open{share}"), sample_ms=0)
    assert not comparison.failures and len(comparison.errors) == 10
    comparison.rounds(1)
    assert {row.provider for row in comparison.rows()} == {"gatedconv", "conv2d", "conv2d on compact weights", "mkldnn"}
