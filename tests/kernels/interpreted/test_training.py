"""A small network trains the same by kernels and by the reference, losses and all."""

from __future__ import annotations

import copy

import pytest
import torch

import gatedconv
from gatedconv import ops
from gatedconv.models import ResNet
from tests.tolerances import assert_close, near, tolerance


def train(mode, monkeypatch, model, device, steps=2):
    monkeypatch.setenv("GATEDCONV_TRITON", mode)
    model = copy.deepcopy(model).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    x, labels = torch.randn(6, 1, 4, 4).to(device), torch.arange(6, device=device) % 3
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
    model = ResNet(8, 3, gate, position, input_size=(1, 4, 4), **options)
    for found in gatedconv.gates(model).values():
        torch.nn.init.normal_(found.fc2.weight, std=0.3)
    (expected, reference), (losses, trained) = (train(m, monkeypatch, model, device) for m in ("off", "auto"))
    assert losses == near(expected, algorithm="metrics")
    got = trained.state_dict()
    for name, value in reference.state_dict().items():
        assert_close(got[name], value, algorithm="training", name=name)
    for name, found in gatedconv.gates(trained).items():
        # The same decisions: one that differs moves a rate by 1/6. A mean may be a sum times 1/6 or a sum over 6, and
        # on a GPU the two differ in the last bit.
        torch.testing.assert_close(found.open_rate, gatedconv.gates(reference)[name].open_rate, msg=name)


def watched_model(monkeypatch, device):
    """A network with layer gates by kernels, and what each gate was called with."""
    monkeypatch.setenv("GATEDCONV_TRITON", "auto")
    model = ResNet(14, 3, "layer", input_size=(1, 4, 4)).to(device).train()
    seen = []
    for block in (*model.layer1, *model.layer2):
        block.layer_gate.register_forward_pre_hook(lambda gate, arguments: seen.append(arguments))
    return model, seen


def test_blocks_hand_on_what_they_pooled(monkeypatch, device):
    """The second block's gate must not read the map again: with a wrong hand-over its logits change."""
    model, seen = watched_model(monkeypatch, device)
    model(torch.randn(3, 1, 4, 4).to(device))
    assert seen[0][1] is None
    for x, pooled in seen[1:]:
        torch.testing.assert_close(pooled, x.mean((2, 3)))


@pytest.mark.parametrize("change", [lambda out: 2 * out, lambda out: out.add_(1), lambda out: out.clone()])
def test_hooks_of_stages_and_blocks_run_and_what_they_change_counts(monkeypatch, device, change):
    model, seen = watched_model(monkeypatch, device)
    calls = []
    model.layer3.register_forward_hook(lambda *_: calls.append("stage"))
    model.layer1[0].register_forward_hook(lambda module, arguments, out: calls.append("block") or change(out.detach()))
    model(torch.randn(3, 1, 4, 4).to(device))
    assert calls == ["block", "stage"]
    x, pooled = seen[1]
    assert pooled is None, "the sums are another tensor's"
    x, pooled = seen[2]
    torch.testing.assert_close(pooled, x.mean((2, 3)))


def test_a_step_in_mixed_precision_with_a_scaler_is_the_references(monkeypatch, device):
    """Autocast and GradScaler: the same decisions, the same steps left out, weights that are as close as that dtype."""
    model = ResNet(8, 3, "both", input_size=(1, 8, 8)).to(device).train()
    for found in gatedconv.gates(model).values():
        torch.nn.init.normal_(found.fc2.weight, std=0.3)
    x, labels = torch.randn(6, 1, 8, 8).to(device), torch.arange(6, device=device) % 3
    results = []
    for mode in ("off", "auto"):
        monkeypatch.setenv("GATEDCONV_TRITON", mode)
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127)  # the first step overflows
        for _ in range(2):
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(trained(x).float(), labels)
            scaler.scale(8 * (loss + gatedconv.polarization_loss(trained))).backward()
            before = trained.conv1.weight.clone()
            scaler.step(optimizer)
            assert torch.equal(before, trained.conv1.weight) == (scaler.get_scale() > 1e38), "left out, or not"
            scaler.update(1024.0)
            optimizer.zero_grad()
        results.append((trained, loss.item()))
    (reference, expected), (trained, loss) = results
    assert loss == near(expected, torch.bfloat16)
    for name, value in reference.state_dict().items():
        assert trained.state_dict()[name].isfinite().all(), name
        got = trained.state_dict()[name]
        if name.endswith("running_open_rate"):  # of 6 samples, momentum 0.1: two decisions may differ in bf16
            assert ((got - value).abs() <= 0.1 * 2 / 6 + tolerance(terms=6)).all(), name
            continue
        # What starts at 0, as biases do, is all update, a sum whose terms cancel: steps are measured against 1.
        largest = max(1.0, value.abs().max().item())
        assert_close(got, value, dtype=torch.bfloat16, scale=largest, name=name)


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
