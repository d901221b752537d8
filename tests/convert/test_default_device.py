"""Networks that are not on the default device: what gatedconv works out about them is on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatedconv
from tests.engine.nets import Residual, settle
from tests.tolerances import assert_close


def network() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 8))
    groups = (nn.Conv2d(8, 12, 3, groups=2), nn.Hardswish(), nn.ChannelShuffle(2), nn.Conv2d(12, 6, 1), nn.PReLU(6))
    return nn.Sequential(*stem, *groups, nn.Flatten(), nn.Linear(6 * 36, 5))


@pytest.mark.parametrize("gate", ["channel", "both"])
def test_from_gates_to_the_engine(gate, tmp_path):
    torch.manual_seed(0)
    path, model, x = tmp_path / "a.safetensors", settle(network()), torch.randn(2, 3, 8, 8)
    torch.set_default_device("meta")  # what is made there has no numbers: any use of them raises
    try:
        gated = gatedconv.gate_model(model, gate, example_input=x)
        masks = {n: torch.arange(g.num_gates, device="cpu") % 2 == 0 for n, g in gatedconv.gates(gated).items()}
        frozen = gatedconv.freeze(gated, masks=masks)
        compact = gatedconv.compact(frozen, x)
        gatedconv.save(compact, path)
        results = [net(x) for net in (compact, gatedconv.Engine(compact, x), gatedconv.load(path))]
        macs = gatedconv.count_macs(compact, x)
    finally:
        torch.set_default_device(None)
    for result in results:
        assert_close(result, frozen(x), algorithm="network")
    assert macs == gatedconv.count_macs(compact, x) < gatedconv.count_macs(model, x)
