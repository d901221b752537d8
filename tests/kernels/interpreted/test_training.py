"""A small network trains the same by kernels and by the reference, losses and all."""

from __future__ import annotations

import copy

import pytest
import torch

import gatedconv
from gatedconv import ops
from gatedconv.models import ResNet


def train(mode, monkeypatch, model, device, steps=2):
    monkeypatch.setenv("GATEDCONV_TRITON", mode)
    model = copy.deepcopy(model).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    x, labels = torch.randn(6, 1, 8, 8).to(device), torch.arange(6, device=device) % 3
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss = loss + 2 * gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
        loss = loss + 0.1 * gatedconv.activation_loss(model, weight="macs")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(
    ("gate", "position", "options"),
    [
        ("layer", "after", {}),
        ("both", "after", {"estimator": "gumbel"}),
        ("channel", "middle", {"shortcut": "A"}),
        ("both", "before", {"hidden": None}),
        ("channel", "after", {"pool": "flatten"}),
    ],
)
def test_losses_and_states_are_the_same(monkeypatch, device, gate, position, options):
    model = ResNet(8, 3, gate, position, input_size=(1, 8, 8), **options)
    for found in gatedconv.gates(model).values():
        torch.nn.init.normal_(found.fc2.weight, std=0.3)
    (expected, reference), (losses, trained) = (train(m, monkeypatch, model, device) for m in ("off", "auto"))
    assert losses == pytest.approx(expected, rel=1e-4)
    got = trained.state_dict()
    for name, value in reference.state_dict().items():
        assert torch.allclose(got[name], value, rtol=1e-3, atol=1e-4), name
    for name, found in gatedconv.gates(trained).items():
        assert torch.equal(found.open_rate, gatedconv.gates(reference)[name].open_rate), name


def test_blocks_hand_on_what_they_pooled(monkeypatch, device):
    """The second block's gate must not read the map again: with a wrong hand-over its logits change."""
    monkeypatch.setenv("GATEDCONV_TRITON", "auto")
    model = ResNet(14, 3, "layer", input_size=(1, 4, 4)).to(device).train()
    seen = []
    for block in (*model.layer1, *model.layer2):
        block.layer_gate.register_forward_pre_hook(lambda gate, arguments: seen.append(arguments))
    model(torch.randn(3, 1, 4, 4).to(device))
    assert seen[0][1] is None
    for x, pooled in seen[1:]:
        torch.testing.assert_close(pooled, x.mean((2, 3)))


def test_a_frozen_norm_or_a_hook_takes_the_plain_path(monkeypatch, device):
    monkeypatch.setenv("GATEDCONV_TRITON", "auto")
    model = ResNet(8, 3, "layer", input_size=(1, 4, 4)).to(device).train()
    x = torch.randn(3, 1, 4, 4).to(device)
    block, calls = model.layer1[0], []
    block.bn2.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]
    before = model.layer2[0].bn2.running_mean.clone()
    model.layer2[0].bn2.eval()
    model(x)
    assert torch.equal(model.layer2[0].bn2.running_mean, before)


def test_the_switch_turns_kernels_off(monkeypatch, device):
    x = torch.zeros(1, device=device)
    monkeypatch.setenv("GATEDCONV_TRITON", "off")
    assert not ops.kernels_run_on(x)
    monkeypatch.setenv("GATEDCONV_TRITON", "auto")
    assert ops.kernels_run_on(x)
    monkeypatch.setenv("GATEDCONV_TRITON", "yes")
    with pytest.raises(ValueError, match="GATEDCONV_TRITON: expected auto or off, got 'yes'"):
        ops.kernels_run_on(x)
