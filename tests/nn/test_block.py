"""Nothing closed is computed: counted on the convolutions themselves."""

from __future__ import annotations

import pytest
import torch

from gatedconv import ChannelGate, LayerGate
from gatedconv.nn import BasicBlock
from tests.tolerances import assert_close


def brightness_gate(channels, threshold):
    """Open where the mean of channel 0 is above the threshold."""
    gate = LayerGate(channels)
    for layer in (gate.fc1, gate.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    gate.fc1.weight.data[0, 0] = 1
    gate.fc2.weight.data[0, 0] = 1
    gate.fc2.bias.data[0] = -threshold
    return gate


def count_samples(block):
    seen = []
    for conv in (block.conv1, block.conv2):
        conv.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    return seen


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pattern", [[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("grad", [True, False])
def test_eval_runs_the_branch_on_open_samples_only(pattern, stride, grad):
    torch.manual_seed(0)
    channels = 4 if stride == 1 else 6
    block = BasicBlock(4, channels, stride, layer_gate=brightness_gate(4, 0.5)).eval()
    x = torch.rand(5, 4, 8, 8)
    x[:, 0] = torch.tensor(pattern).float().view(5, 1, 1)
    saved = x.clone()
    seen = count_samples(block)
    with torch.set_grad_enabled(grad):
        out = block(x)
    assert seen == ([sum(pattern)] * 2 if sum(pattern) else [])
    assert torch.equal(x, saved)  # the input is the caller's
    with torch.no_grad():
        shortcut = x if block.downsample is None else block.downsample(x)
        factor = torch.tensor(pattern).float().view(5, 1, 1, 1)
        expected = torch.relu(shortcut + factor * block.branch(x))
    assert_close(out, expected)


def test_training_computes_every_sample_as_the_paper_does():
    block = BasicBlock(4, 4, layer_gate=brightness_gate(4, 0.5)).train()
    seen = count_samples(block)
    block(torch.rand(5, 4, 8, 8))
    assert seen == [5, 5]


@pytest.mark.parametrize("position", ["before", "middle", "after"])
def test_a_channel_gate_multiplies_after_the_norm_at_its_position(position):
    torch.manual_seed(0)
    block = BasicBlock(4, 6, 2, position=position, channel_gate=ChannelGate(4 if position == "before" else 6)).eval()
    for norm in (block.bn1, block.bn2):
        torch.nn.init.normal_(norm.bias)
    torch.nn.init.zeros_(block.channel_gate.fc2.weight)
    torch.nn.init.constant_(block.channel_gate.fc2.bias, -0.5)
    x = torch.rand(3, 4, 8, 8)
    zeros = torch.zeros_like(x)
    part = block.branch(x)
    if position == "after":
        assert torch.equal(part, torch.zeros_like(part))
    elif position == "middle":
        torch.testing.assert_close(part, block.bn2(torch.zeros_like(part)))
    else:
        torch.testing.assert_close(part, block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(zeros))))))


def test_a_closed_block_ends_in_the_activation_that_it_has():
    block = BasicBlock(4, 4, layer_gate=LayerGate(4)).eval()
    torch.nn.init.constant_(block.layer_gate.fc2.bias, -9.0)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), torch.relu(x))
    block.relu = torch.nn.LeakyReLU(0.1, inplace=True)
    kept = x.clone()
    assert torch.equal(block(x), torch.nn.functional.leaky_relu(x, 0.1)) and torch.equal(x, kept)


def test_a_block_with_another_activation_or_hooks_does_not_end_in_one_operator():
    """What the operator would not call, or computes in its own way, is called."""
    block = BasicBlock(4, 4, layer_gate=LayerGate(4))
    assert block._learns_at_its_end()
    for name in ("bn2", "relu"):
        for register in ("register_forward_hook", "register_full_backward_pre_hook"):
            handle = getattr(getattr(block, name), register)(lambda *arguments: None)
            assert not block._learns_at_its_end()
            handle.remove()
    assert block._learns_at_its_end()
    block.relu = torch.nn.SiLU()
    assert not block._learns_at_its_end()
