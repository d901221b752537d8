"""MACs of networks in which the user has swapped convolutions for gated ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatedconv
from tests.convert.unusual import images
from tests.oracle import random_masks


def gated(inputs, outputs, kernel=3, **options):
    return gatedconv.Conv2d(inputs, outputs, kernel, padding=kernel // 2, gate="channel", **options)


class Branched(nn.Module):
    """A stem, a residual branch, two groups of a concatenation, and a norm behind a gated layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), gated(8, 12), nn.Conv2d(12, 8, 1)
        self.left, self.right = gated(8, 6), gated(8, 10, bias=False)
        self.norm, self.last, self.fc = nn.BatchNorm2d(16), gated(16, 8, stride=2), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.inner(x)))
        x = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


PLAIN = nn.Sequential(gated(3, 32), nn.ReLU(), gated(32, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("model", [nn.Sequential(*PLAIN, nn.Linear(64, 10)), Branched()])
@pytest.mark.parametrize("kind", ["odd", "one"])
def test_expected_macs_are_those_of_the_compact_network(model, kind):
    x = images(2, 3, 12, 12)
    gatedconv.attach_macs(model.eval(), x)
    masks = random_masks({name: gate.num_gates for name, gate in gatedconv.gates(model).items()}, kind, 3)
    frozen = gatedconv.freeze(model, masks=masks).eval()
    counted = gatedconv.count_macs(gatedconv.compact(frozen, x), x[:1])
    expected = float(gatedconv.expected_macs(model, {name: mask.float() for name, mask in masks.items()}))
    # A norm of constants and the pool of closed channels go as well.
    assert counted == pytest.approx(expected, rel=0.02)


def test_the_pruner_reaches_its_target():
    torch.manual_seed(0)
    model, x = Branched().train(), images(8, 3, 12, 12)
    gatedconv.attach_macs(model, x[:1])
    dense = float(
        gatedconv.expected_macs(model, {n: torch.ones(g.num_gates) for n, g in gatedconv.gates(model).items()})
    )
    pruner = gatedconv.GatePruner(model)
    for _ in range(3):
        (model(x).square().sum() + gatedconv.mac_target_loss(model, 0.6)).backward()
    pruner.prune(0.6)
    frozen = gatedconv.freeze(model, [x])
    left = gatedconv.count_macs(gatedconv.compact(frozen.eval(), x[:1]), x[:1])
    assert 0.4 * dense < left <= 0.6 * dense
    assert frozen.mac_terms == model.mac_terms


def test_the_model_stays_as_it_is():
    model, x = Branched().train(), images(2, 3, 12, 12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gatedconv.attach_macs(model, x)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.inner) is gatedconv.Conv2d and model.inner.gate is not None


def test_what_cannot_be_counted_is_refused():
    x = images(2, 3, 12, 12)
    with pytest.raises(TypeError, match="attach_macs: model must be a torch.nn.Module, got str"):
        gatedconv.attach_macs("resnet", x)
    with pytest.raises(ValueError, match="attach_macs: the model has no gates"):
        gatedconv.attach_macs(nn.Conv2d(3, 4, 3), x)
    with pytest.raises(ValueError, match="attach_macs: .* does not run"):
        gatedconv.attach_macs(Branched(), images(2, 4, 12, 12))
    with pytest.raises(ValueError, match="expected gates of gatedconv.Conv2d alone, found 'layer1.0.channel_gate'"):
        gatedconv.attach_macs(gatedconv.models.resnet20(gate="channel"), images(2, 3, 32, 32))
    masks = {name: torch.ones(gate.num_gates, dtype=torch.bool) for name, gate in gatedconv.gates(Branched()).items()}
    with pytest.raises(ValueError, match="the gate 'inner.gate' is frozen"):
        gatedconv.attach_macs(gatedconv.freeze(Branched(), masks=masks), x)
    own = Branched()
    own.mac_terms = "mine"
    with pytest.raises(ValueError, match="has an attribute 'mac_terms' of its own"):
        gatedconv.attach_macs(own, x)


def test_a_layer_that_runs_twice_decides_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = gated(3, 3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    x = images(2, 3, 12, 12)
    model = Twice()
    gatedconv.attach_macs(model, x)
    assert model.conv.gate.calls == 2
    gatedconv.attach_macs(model, x)
    assert len(model._forward_pre_hooks) == 1
    rates = {"conv.gate": torch.tensor([1.0, 0.0, 0.0])}
    assert float(gatedconv.expected_macs(model, rates)) == 2 * 3 * 3 * 3 * 3 * 12 * 12 / 3  # of x it reads all channels
    model.train()(x)
    assert model.conv.gate.logits.shape == (4, 3)
    model.unused = gated(3, 3)
    with pytest.raises(ValueError, match="'unused' does not run on the example"):
        gatedconv.attach_macs(model, x)


def test_layers_that_are_more_than_a_gated_convolution_are_refused():
    class Larger(gatedconv.Conv2d):
        def forward(self, input):
            return super().forward(nn.functional.interpolate(input, scale_factor=2.0))

    x = images(2, 3, 12, 12)
    with pytest.raises(ValueError, match="expected gatedconv.Conv2d itself at '0', which is a Larger"):
        gatedconv.attach_macs(nn.Sequential(Larger(3, 8, 3, gate="channel")), x)
    for normalize in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        with pytest.raises(ValueError, match="itself at '0', which has weights that are computed"):
            gatedconv.attach_macs(nn.Sequential(normalize(gated(3, 8))), x)
    shared = nn.Sequential(gated(3, 8), gated(8, 8))
    shared[1].gate = shared[0].gate
    with pytest.raises(ValueError, match="the gate '0.gate' is in several layers"):
        gatedconv.attach_macs(shared, x)
