"""The regularizers against the paper's equations, written out by hand."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from gatedconv import activation_loss, expected_macs, mac_target_loss, polarization_loss, pruning_rate
from tests.oracle import random_masks
from tests.tolerances import near, tolerance


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = gatedconv.models.resnet20(gate="both", position="middle", input_size=(3, 8, 8))
    for gate in gatedconv.gates(model).values():
        torch.nn.init.normal_(gate.fc2.weight)
        torch.nn.init.normal_(gate.fc2.bias, std=0.3)
    model(torch.randn(16, 3, 8, 8))
    return model


def test_polarization_is_equations_7_and_8(model):
    rates = [g.open_rate.tolist() for g in gatedconv.gates(model).values()]
    expected = sum(sum((1 - r) * r for r in gate) / len(gate) for gate in rates) / len(rates)
    assert 0.01 < expected < 0.25
    assert polarization_loss(model).item() == near(expected)


def test_polarization_gradient_is_one_minus_two_g(model):
    gate = gatedconv.gates(model)["layer2.1.channel_gate"]
    gate.open_rate.retain_grad()
    polarization_loss(model).backward()
    expected = (1 - 2 * gate.open_rate) / (len(gatedconv.gates(model)) * gate.num_gates)
    torch.testing.assert_close(gate.open_rate.grad, expected)
    assert gate.fc1.weight.grad.abs().sum() > 0


def test_gradcheck_of_the_forms_with_gradients_of_their_own(model):
    gates = gatedconv.gates(model)
    rates = [torch.rand(gate.num_gates, dtype=torch.float64).requires_grad_() for gate in gates.values()]

    def polarization(*rates):
        for gate, rate in zip(gates.values(), rates, strict=True):
            gate.open_rate = rate
        return polarization_loss(model)

    def macs(*rates):
        total = sum(term.macs for term in model.mac_terms)
        return expected_macs(model, dict(zip(gates, rates, strict=True))) / total

    for function in (polarization, macs):
        assert torch.autograd.gradcheck(function, rates)


def test_activation_is_equation_10_uniform_or_weighted(model):
    means = {name: g.open_rate.mean().item() for name, g in gatedconv.gates(model).items()}
    assert activation_loss(model).item() == near(sum(means.values()) / len(means))
    weights = {name: sum(t.macs for t in model.mac_terms if name in t.gates) for name in means}
    weighted = sum(weights[n] * means[n] for n in means) / sum(weights.values())
    assert activation_loss(model, weight="macs").item() == near(weighted)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("position", ["before", "middle", "after"])
def test_expected_macs_at_a_mask_are_the_macs_and_parameters_of_the_compact_net(position, shortcut):
    model = gatedconv.models.resnet20(gate="both", position=position, shortcut=shortcut, input_size=(3, 16, 16)).eval()
    masks = random_masks({n: g.num_gates for n, g in gatedconv.gates(model).items()}, "odd", seed=1)
    x = torch.randn(1, 3, 16, 16)
    small = gatedconv.compact(gatedconv.freeze(model, masks=masks), x)
    rates = {name: mask.double() for name, mask in masks.items()}
    assert expected_macs(model, rates).item() == near(gatedconv.count_macs(small, x), torch.float64)
    kept = sum(p.numel() for p in small.parameters())
    total = sum(p.numel() for p in gatedconv.models.resnet20(shortcut=shortcut).parameters())
    assert pruning_rate(model, rates).item() == near(1 - kept / total, torch.float64)


def test_mac_target_is_zero_at_its_target_and_pulls_both_ways(model):
    total = sum(term.macs for term in model.mac_terms)
    share = (expected_macs(model) / total).item()
    assert 0 < share < 1
    assert mac_target_loss(model, share).item() == near(0, scale=tolerance())
    assert mac_target_loss(model, share / 2).item() == near(1)
    gate = gatedconv.gates(model)["layer1.0.layer_gate"]
    for target, sign in ((share / 2, 1), (min(1.0, share * 1.5), -1)):
        (slope,) = torch.autograd.grad(mac_target_loss(model, target), gate.open_rate, retain_graph=True)
        assert slope.item() * sign > 0


def test_errors_name_the_loss_and_the_cause(model):
    dense = gatedconv.models.resnet20()
    fresh = gatedconv.models.resnet20(gate="layer")
    for loss in (polarization_loss, activation_loss, mac_target_loss):
        with pytest.raises(ValueError, match=f"{loss.__name__}: the model has no gates"):
            loss(dense)
        with pytest.raises(ValueError, match=f"{loss.__name__}: gate 'layer1.0.layer_gate' has seen no batch"):
            loss(fresh)
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\], got 0"):
        mac_target_loss(model, 0)
    with pytest.raises(ValueError, match="weight must be"):
        activation_loss(model, "flops")
    conv = torch.nn.Sequential(gatedconv.Conv2d(3, 4, 3, gate="channel"))
    conv(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="MACs of Sequential are unknown"):
        mac_target_loss(conv)
