"""The fast network: shapes, MACs, whitening, and exactness from forced masks to the engine."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from gatedconv.models import cifar_vgg
from tests.tolerances import assert_close, relative_error, tolerance

SMALL = {"widths": (8, 12, 12), "input_size": (3, 26, 29)}


def gated(activation: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = cifar_vgg(10, "channel", activation=activation, **SMALL).train()
    model.init_whitening(torch.randn(8, 3, 26, 29))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.5)
    model(torch.randn(8, 3, 26, 29))  # running statistics
    return model.eval()


def test_shapes_gates_and_macs_at_full_size():
    model = cifar_vgg(10, "channel").eval()
    assert list(gatedconv.gates(model)) == [f"group{number}.channel_gate" for number in (1, 2, 3)]
    assert [gate.num_gates for gate in gatedconv.gates(model).values()] == [64, 256, 256]
    dense = cifar_vgg(100)
    assert dense(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    dense = cifar_vgg(10).eval()
    macs = gatedconv.count_macs(dense, torch.randn(1, 3, 32, 32))
    assert macs == sum(term.macs for term in dense.mac_terms) == pytest.approx(118e6, rel=0.01)
    ones = {name: torch.ones(gate.num_gates) for name, gate in gatedconv.gates(model).items()}
    assert gatedconv.expected_macs(model, ones) == pytest.approx(macs)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("kind", ["open", "closed", "one", "odd"])
def test_forced_masks_frozen_compact_and_engine_agree(activation, kind):
    model, x = gated(activation), torch.randn(3, 3, 26, 29)
    masks = {}
    for number, (name, gate) in enumerate(gatedconv.gates(model).items()):
        mask = torch.arange(gate.num_gates) % 3 != number
        masks[name] = {"open": mask | True, "closed": mask & False, "odd": mask}.get(
            kind, torch.arange(gate.num_gates) == number
        )
    with torch.no_grad():
        for name, gate in gatedconv.gates(model).items():
            gate.fc2.weight.zero_()
            gate.fc2.bias.copy_(masks[name].float() * 2 - 1)
        expected = model(x)
        frozen = gatedconv.freeze(model, masks=masks)
        small = gatedconv.compact(frozen, x)
        results = [frozen(x), small(x), gatedconv.Engine(small, x)(x)]
    for found in results:
        assert relative_error(found, expected) <= tolerance()
    widths = [small.get_submodule(f"group{number}.conv1").out_channels for number in (1, 2, 3)]
    assert widths == [max(1, int(mask.sum())) for mask in masks.values()]
    assert not gatedconv.gates(small)


@pytest.mark.parametrize("stage", ["dense", "gated", "frozen", "compact"])
def test_every_stage_is_loaded_as_it_was_saved(stage, tmp_path):
    model, x = gated("gelu"), torch.randn(3, 3, 26, 29)
    if stage == "dense":
        model = cifar_vgg(10, **SMALL).eval()
    if stage in ("frozen", "compact"):
        gates = gatedconv.gates(model)
        model = gatedconv.freeze(model, masks={n: torch.arange(g.num_gates) % 3 != 1 for n, g in gates.items()})
    if stage == "compact":
        model = gatedconv.compact(model, x)
    gatedconv.save(model, tmp_path / "model")
    loaded = gatedconv.load(tmp_path / "model")
    assert type(loaded) is type(model) and loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_whitening_makes_patches_uncorrelated():
    torch.manual_seed(0)
    model = cifar_vgg(**SMALL)
    images = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 28, 31), 3, 1)  # neighbors are alike
    model.init_whitening(images, eps=0.0)
    out = model.whiten(images).movedim(1, 3).reshape(-1, 24)
    assert_close(out[:, :12].T @ out[:, :12] / len(out), torch.eye(12), algorithm="gradient")
    assert torch.equal(out[:, 12:], -out[:, :12]) and not model.whiten.weight.requires_grad
    with pytest.raises(ValueError, match="images must be"):
        model.init_whitening(images[:, :1])


def test_a_training_step_moves_what_learns():
    torch.manual_seed(0)
    model = cifar_vgg(10, "channel", **SMALL).train()
    loss = model(torch.randn(4, 3, 26, 29)).square().sum() + gatedconv.polarization_loss(model)
    (loss + gatedconv.mac_target_loss(model)).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert still == {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"gate": "layer"}, "gate must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"estimator": "sigmoid"}, "estimator must be one of"),
        ({"input_size": (3, 64, 64)}, "H and W from 25 to 48"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cifar_vgg(**options)


def test_a_choice_of_a_type_without_a_hash_is_a_value_error():
    with pytest.raises(ValueError, match=r"activation must be one of .*, got \['gelu'\]"):
        gatedconv.models.cifar_vgg(10, activation=["gelu"])
