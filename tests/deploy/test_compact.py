"""compact: what is left, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.convert import ConversionError
from gatedconv.deploy import resnet_blocks
from gatedconv.nn import ChannelBias, CompactBlock, ConstantMap, GatherChannels, PadShortcut, ScatterAdd
from tests.oracle import random_masks, randomize_statistics
from tests.tolerances import relative_error, tolerance

OURS = (gatedconv.models.ResNet, CompactBlock, GatherChannels, ScatterAdd, ChannelBias, ConstantMap, PadShortcut)
X = torch.zeros(1, 3, 16, 16)


def compacted(kind, gate="both", position="after", seed=0):
    torch.manual_seed(0)
    model = gatedconv.models.resnet20(gate=gate, position=position, input_size=(3, 16, 16)).eval()
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, kind, seed)
    return gatedconv.compact(gatedconv.freeze(model, masks=masks), X), masks


@pytest.mark.parametrize("position", ["before", "middle", "after"])
@pytest.mark.parametrize("kind", ["open", "closed", "one", "odd"])
def test_only_plain_modules_remain(kind, position):
    small, _ = compacted(kind, position=position)
    for name, module in small.named_modules():
        assert type(module).__module__.startswith("torch.nn") or type(module) in OURS, name
    assert not any("gate" in name for name in small.state_dict())


def test_closed_layers_vanish():
    small, _ = compacted("closed", gate="layer")
    assert [type(block) for block in small.layer1] == [nn.Identity] * 3
    convolutions = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 3  # the stem and two projections
    assert gatedconv.count_macs(small, X) < 0.02 * gatedconv.count_macs(gatedconv.models.resnet20(), X)


def test_everything_open_is_the_dense_network():
    small, _ = compacted("open")
    dense = gatedconv.models.resnet20()
    assert gatedconv.count_macs(small, X) == gatedconv.count_macs(dense, X)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize(("position", "sides"), [("before", (1, 0)), ("middle", (1, 1)), ("after", (0, 1))])
def test_convolutions_have_exactly_the_open_channels(position, sides):
    small, masks = compacted("odd", gate="channel", position=position, seed=5)
    for name, mask in masks.items():
        branch = small.get_submodule(name.removesuffix("channel_gate") + "branch")
        count = int(mask.sum())
        if position == "before":
            assert branch.conv1.in_channels == count
        if position == "middle":
            assert branch.conv1.out_channels == branch.bn1.num_features == branch.conv2.in_channels == count
        if position == "after":
            assert branch.conv2.out_channels == branch.bn2.num_features == count


def test_compact_leaves_the_frozen_model_alone_and_shares_nothing_with_it():
    model = gatedconv.models.resnet20(gate="channel", position="middle", input_size=(3, 16, 16)).eval()
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, "odd", 0)
    frozen = gatedconv.freeze(model, masks=masks)
    before = frozen(torch.ones(1, 3, 16, 16))
    small = gatedconv.compact(frozen, X)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(frozen(torch.ones(1, 3, 16, 16)), before)


def test_the_compact_net_trains_scripts_and_traces():
    small, _ = compacted("odd", position="before")
    small.train()(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)
    small.eval()
    traced = torch.fx.symbolic_trace(small)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(traced(x), small(x))


def test_bad_arguments_are_named():
    model = gatedconv.models.resnet20(gate="layer")
    with pytest.raises(ValueError, match="freeze the model first; gate 'layer1.0.layer_gate' is still learning"):
        gatedconv.compact(model, X)
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        gatedconv.compact("model", X)
    with pytest.raises(TypeError, match="example_input must be a tensor or hold tensors"):
        gatedconv.compact(gatedconv.models.resnet20(), (1, 3, 16, 16))


@pytest.mark.parametrize("position", ["before", "middle", "after"])
def test_widths_of_our_blocks_are_rounded_up_with_zeros(position, tmp_path):
    torch.manual_seed(0)
    model = gatedconv.models.resnet20(gate="channel", position=position, input_size=(3, 16, 16)).eval()
    randomize_statistics(model, 0)
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, "odd", 1)
    frozen, images = gatedconv.freeze(model, masks=masks), torch.randn(2, 3, 16, 16)
    small = gatedconv.compact(frozen, images, channel_multiple=8)
    with torch.no_grad():
        expected = frozen(images)
        assert relative_error(small(images), expected) <= tolerance()
        gatedconv.save(small, tmp_path / "m")
        assert torch.equal(gatedconv.load(tmp_path / "m")(images), small(images))
    layer = "conv2" if position == "after" else "conv1"
    width = "in_channels" if position == "before" else "out_channels"
    widths = [getattr(m, width) for n, m in small.named_modules() if n.endswith(layer) and "layer" in n]
    assert widths and all(w % 8 == 0 for w in widths)
    assert any(int(mask.sum()) % 8 for mask in masks.values())


def test_our_own_networks_are_compared_with_their_source(monkeypatch):
    model = gatedconv.models.resnet20(gate="channel", position="middle", input_size=(3, 8, 8))
    masks = {name: torch.arange(gate.num_gates) % 2 == 0 for name, gate in gatedconv.gates(model).items()}
    frozen = gatedconv.freeze(model, masks=masks)
    small = resnet_blocks.compact_block

    def wrong(block, multiple):
        result = small(block, multiple)
        with torch.no_grad():
            next(p for p in result.parameters() if p.dim() == 4).mul_(1.01)
        return result

    monkeypatch.setattr(resnet_blocks, "compact_block", wrong)
    with pytest.raises(ConversionError, match="the result differs by .* first at layer1"):
        gatedconv.compact(frozen, torch.randn(2, 3, 8, 8))
    gatedconv.compact(frozen, torch.randn(2, 3, 8, 8), verify=False)


def test_widths_of_vgg_groups_are_rounded_up_with_zeros(tmp_path):
    torch.manual_seed(0)
    model = gatedconv.models.cifar_vgg(gate="channel", widths=(16, 16, 24)).eval()
    randomize_statistics(model, 0)
    masks = {name: torch.arange(gate.num_gates) < 5 for name, gate in gatedconv.gates(model).items()}
    masks[list(masks)[-1]][:] = False  # of a group that is all closed one channel stays
    frozen, x = gatedconv.freeze(model, masks=masks), torch.randn(2, 3, 32, 32)
    small = gatedconv.compact(frozen, x, channel_multiple=8)
    widths = [module.out_channels for name, module in small.named_modules() if name.endswith("conv1")]
    assert widths == [8, 8, 1]
    gatedconv.save(small, tmp_path / "small.safetensors")
    for net in (small, gatedconv.load(tmp_path / "small.safetensors")):
        assert relative_error(net(x), frozen(x)) <= tolerance(algorithm="network")
