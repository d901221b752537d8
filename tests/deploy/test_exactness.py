"""The exactness contract: gated with forced masks == frozen == compact == loaded, for every configuration."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from tests.oracle import forced_forward, random_masks, randomize_statistics
from tests.tolerances import assert_close, relative_error, tolerance

KINDS = ("open", "closed", "one", "odd")


def gated_model(gate, position, shortcut, dtype=torch.float32, **options):
    torch.manual_seed(0)
    # depth 8: an identity block and both kinds of downsampling, at a third of the time of ResNet-20
    model = gatedconv.models.ResNet(8, gate=gate, position=position, shortcut=shortcut, **options)
    randomize_statistics(model, seed=1)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("position", ["before", "middle", "after"])
@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
def test_frozen_and_compact_equal_the_oracle(gate, position, shortcut, dtype):
    model = gated_model(gate, position, shortcut, dtype)
    sizes = {name: g.num_gates for name, g in gatedconv.gates(model).items()}
    x = torch.randn(3, 3, 20, 14, dtype=dtype)
    limit = tolerance(dtype)
    outputs = {}
    for kind in KINDS:
        masks = random_masks(sizes, kind, seed=2)
        with torch.no_grad():
            expected = forced_forward(x, model.state_dict(), masks, position)
            frozen = gatedconv.freeze(model, masks=masks)
            small = gatedconv.compact(frozen, x)
            outputs[kind] = expected
            assert relative_error(frozen(x), expected) <= limit
            assert relative_error(small(x), expected) <= limit
            assert relative_error(small(x.contiguous(memory_format=torch.channels_last)), expected) <= limit
    # The masks must matter, or the comparisons above compare nothing.
    assert relative_error(outputs["closed"], outputs["open"]) > 1e-2
    assert relative_error(outputs["odd"], outputs["open"]) > 1e-2


@pytest.mark.parametrize("position", ["before", "middle", "after"])
def test_an_unfrozen_model_whose_gates_agree_equals_its_frozen_self(position):
    model = gated_model("both", position, "B")
    sizes = {name: g.num_gates for name, g in gatedconv.gates(model).items()}
    masks = random_masks(sizes, "odd", seed=3)
    for name, gate in gatedconv.gates(model).items():  # logits of +-1 whatever the input
        torch.nn.init.zeros_(gate.fc2.weight)
        gate.fc2.bias.data.copy_(masks[name].float() * 2 - 1)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        gated = model(x)
        frozen = gatedconv.freeze(model, loader=[x])
    assert frozen.consensus.agreement == 1.0
    for name, mask in masks.items():  # the channels of a closed layer are nobody's business
        layer = masks[name.replace("channel_gate", "layer_gate")]
        assert torch.equal(frozen.consensus.masks[name], mask) or not layer.any()
    assert relative_error(frozen(x), gated) <= tolerance()
    assert relative_error(forced_forward(x, model.state_dict(), masks, position), gated) <= tolerance()


def test_frozen_and_compact_work_for_any_batch_and_size():
    model = gated_model("both", "after", "A")
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, "odd", seed=4)
    frozen = gatedconv.freeze(model, masks=masks)
    small = gatedconv.compact(frozen, torch.zeros(1, 3, 32, 32))
    for shape in ((0, 3, 32, 32), (1, 3, 9, 17), (5, 3, 33, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = forced_forward(x, model.state_dict(), masks, "after")
            assert frozen(x).shape == small(x).shape == expected.shape
            assert_close(frozen(x), expected)
            assert_close(small(x), expected)
