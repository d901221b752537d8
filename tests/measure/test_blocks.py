"""A cut network block by block: the figures are those of masks and of the parts counted alone."""

from __future__ import annotations

import torch

import gatedconv
from gatedconv.measure.blocks import block_figures


def test_blocks_tell_what_is_left_of_them() -> None:
    model = gatedconv.models.resnet20(gate="both", position="middle", input_size=(1, 8, 8)).eval()
    masks = {name: torch.ones(gate.num_gates, dtype=torch.bool) for name, gate in gatedconv.gates(model).items()}
    masks["layer1.1.layer_gate"][:] = False
    masks["layer2.1.channel_gate"][3:] = False
    x = torch.randn(1, 1, 8, 8)
    net = gatedconv.compact(gatedconv.freeze(model, masks=masks), x).eval()
    rows = {row["block"]: row for row in block_figures(net, masks, x, rounds=0)}
    assert list(rows) == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert rows["layer1.1"] == {
        "block": "layer1.1", "open": 0, "channels": 16, "runs": False, "macs": 0, "ms": None
    }  # fmt: skip
    assert (rows["layer2.1"]["open"], rows["layer2.1"]["channels"], rows["layer2.1"]["runs"]) == (3, 32, True)
    convolutions = 4 * 4 * 9 * 32 * 3 * 2  # two of 3 x 3 between 32 and 3 channels on 4 x 4
    assert convolutions < rows["layer2.1"]["macs"] < 1.2 * convolutions
    rest = gatedconv.count_macs(net, x) - sum(row["macs"] for row in rows.values())
    assert 0 < rest < 0.1 * gatedconv.count_macs(net, x)
    assert all(row["ms"] > 0 for row in block_figures(net, masks, x, rounds=2) if row["macs"])
