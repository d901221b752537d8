"""Layers that read ``self.training``, and functional dropout: eval is exact, training keeps its noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Probabilities(nn.Module):
    """Logits in training, probabilities in eval."""

    def forward(self, x):
        return x if self.training else x.sigmoid()


class Noise(nn.Module):
    """Gaussian noise in training."""

    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Net(nn.Module):
    def __init__(self, inside=None, last=None, drop=None):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.inside, self.last = inside or nn.Identity(), last or nn.Identity()
        self.drop = drop

    def forward(self, x):
        x = self.inside(torch.relu(self.norm(self.one(x))))
        return self.last(self.two(self.drop(x, 0.5, self.training) if self.drop else x))


def test_what_a_layer_does_in_eval_alone_is_kept():
    model = Net(last=Probabilities()).eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    torch.testing.assert_close(gated(IMAGES), model(IMAGES))
    assert 0 <= gated(IMAGES).min() and gated(IMAGES).max() <= 1


def test_conversion_seeds_no_generator_of_another_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
    gatedconv.gate_model(Net(inside=Noise()).eval(), "channel", example_input=IMAGES)


def test_noise_stays_in_training_and_leaves_with_compacting(tmp_path):
    gated = gatedconv.gate_model(Net(inside=Noise()).eval(), "channel", example_input=IMAGES)
    assert torch.equal(gated(IMAGES), gated(IMAGES))
    gated.norm.eval()
    gated.inside.train()
    assert not torch.equal(gated(IMAGES), gated(IMAGES))
    gated.eval()
    frozen = gatedconv.freeze(
        gated, masks={n: torch.arange(g.num_gates) % 2 == 0 for n, g in gatedconv.gates(gated).items()}
    )
    small = gatedconv.compact(frozen, IMAGES)
    assert small.one.out_channels == 4
    torch.testing.assert_close(small(IMAGES), frozen(IMAGES))
    gatedconv.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(gatedconv.load(tmp_path / "small.safetensors")(IMAGES), frozen(IMAGES))


@pytest.mark.parametrize("function", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_functional_dropout_stays_in_training(function):
    model = Net(drop=function).eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    torch.testing.assert_close(gated(IMAGES), model(IMAGES))
    outputs = []
    for network in (gated.train(), model.train()):
        network.norm.eval()
        torch.manual_seed(3)
        outputs.append(network(IMAGES))
    torch.testing.assert_close(*outputs)
    assert not torch.equal(outputs[0], gated(IMAGES))


class Exported(nn.Module):
    """Code that torch.fx cannot follow and torch.export can, with a norm of vectors."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.conv(x)
        if not isinstance(x, torch.Tensor):
            raise TypeError("a tensor is needed")
        return self.norm(self.fc(x.mean((2, 3))))


def test_a_norm_of_vectors_stays_one():
    model = Exported().eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    assert type(gated) is Exported and type(gated.norm) is nn.BatchNorm1d
    torch.testing.assert_close(gated(IMAGES), model(IMAGES))


@pytest.mark.parametrize("drop", [F.dropout, F.dropout2d, F.feature_alpha_dropout], ids=lambda f: f.__name__)
def test_dropout_that_is_always_on_is_kept_and_loads_into_the_dense_network(drop, tmp_path):
    class AlwaysOn(Net):
        def forward(self, x):
            return self.two(drop(torch.relu(self.norm(self.one(x))), 0.5, True))

    model = AlwaysOn().eval()
    gated = gatedconv.gate_model(model, "channel", example_input=IMAGES)
    masks = {n: torch.arange(g.num_gates) % 2 == 0 for n, g in gatedconv.gates(gated).items()}
    small = gatedconv.compact(gatedconv.freeze(gated, masks=masks), IMAGES)
    gatedconv.save(small, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="into="):
        gatedconv.load(tmp_path / "small.safetensors")
    loaded = gatedconv.load(tmp_path / "small.safetensors", into=model)
    outputs = []
    for network in (small, loaded):
        torch.manual_seed(0)
        outputs.append(network(IMAGES))
    assert torch.equal(*outputs) and not torch.equal(small(IMAGES), small(IMAGES))
