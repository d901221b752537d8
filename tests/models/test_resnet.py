"""CIFAR ResNets: the published counts, names and shapes."""

from __future__ import annotations

import pytest
import torch

import gatedconv

# He et al. 2016, Table 6: parameters in millions.
PUBLISHED_PARAMS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_parameters_match_the_publication(name):
    count = sum(p.numel() for p in getattr(gatedconv.models, name)(shortcut="A").parameters())
    assert round(count / 1e6, 1 if name == "resnet110" else 2) == PUBLISHED_PARAMS[name]


def test_resnet110_has_the_macs_that_the_paper_prints():
    macs = gatedconv.count_macs(gatedconv.models.resnet110(shortcut="B"), torch.zeros(1, 3, 32, 32))
    assert round(macs / 1e6, 1) == 255.3


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_mac_terms_add_up_to_fvcore(shortcut):
    model = gatedconv.models.resnet32(shortcut=shortcut, gate="both", input_size=(1, 13, 18), num_classes=7)
    dense = gatedconv.models.resnet32(shortcut=shortcut, input_size=(1, 13, 18), num_classes=7)
    assert sum(t.macs for t in model.mac_terms) == gatedconv.count_macs(dense, torch.zeros(1, 1, 13, 18))
    assert sum(t.params for t in model.mac_terms) == sum(p.numel() for p in dense.parameters())


def test_torchvision_names():
    names = set(gatedconv.models.resnet20(gate="layer").state_dict())
    for name in (
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.bias",
        "layer3.2.bn2.num_batches_tracked",
        "fc.bias",
    ):
        assert name in names
    assert not any("gate" in name for name in gatedconv.models.resnet20().state_dict())


@pytest.mark.parametrize("gate", [None, "layer", "channel", "both"])
@pytest.mark.parametrize("position", ["before", "middle", "after"])
def test_every_gate_trains_and_gets_a_gradient(gate, position):
    torch.manual_seed(0)
    model = gatedconv.models.resnet20(gate=gate, position=position, input_size=(3, 8, 8))
    loss = model(torch.randn(8, 3, 8, 8)).logsumexp(dim=1).sum()
    loss.backward()
    for name, g in gatedconv.gates(model).items():
        assert g.fc2.bias.grad is not None and torch.isfinite(g.fc2.bias.grad).all(), name
        assert g.fc2.bias.grad.abs().sum() > 0, name
    assert len(gatedconv.gates(model)) == {None: 0, "layer": 9, "channel": 9, "both": 18}[gate]


def test_flattened_gates_fit_every_position():
    for position in ("before", "middle", "after"):
        model = gatedconv.models.resnet20(gate="channel", position=position, pool="flatten", input_size=(3, 13, 10))
        assert model(torch.randn(2, 3, 13, 10)).shape == (2, 10)
    sizes = [
        g.fc1.in_features for g in gatedconv.gates(gatedconv.models.resnet20(gate="channel", pool="flatten")).values()
    ]
    assert sizes[0] == 16 * 32 * 32 and sizes[-1] == 64 * 8 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": "block"}, "gate must be one of"),
        ({"position": "end"}, "position must be one of"),
        ({"shortcut": "C"}, "shortcut must be one of"),
        ({"estimator": "x"}, "estimator must be one of"),
        ({"hidden": 0}, "hidden must be"),
        ({"num_classes": 0}, "num_classes must be"),
        ({"input_size": (3, 0, 8)}, "input_size must be"),
        ({"pool": "max"}, "pool must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        gatedconv.models.resnet20(**arguments)
