"""From config to network: every field about gates arrives."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from gatedconv.data import Augment, EvalBatches, load_data
from gatedconv.data.image_data import make_image_data
from gatedconv.gating import open_rates
from gatedconv.train.build import build_model
from gatedconv.train.config import TrainConfig


def test_every_gate_setting_reaches_the_network():
    config = TrainConfig(
        gate="channel",
        position="before",
        estimator="gumbel",
        temperature=0.5,
        hidden=8,
        pool="flatten",
        shortcut="A",
        model="resnet32",
    )
    network = build_model(config, load_data("digits"))
    assert network.config | {"num_classes": 10, "input_size": [1, 8, 8]} == network.config
    gate = gatedconv.gates(network)["layer1.0.channel_gate"]
    assert gate.estimator.temperature == 0.5 and gate.fc1.out_features == 8
    assert gate.fc1.in_features == 16 * 8 * 8 and network.layer1[0].position == "before"
    assert network.config["name"] == "resnet32" and network.config["shortcut"] == "A"


@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
def test_gates_start_where_their_bias_says(gate: str):
    data, images = load_data("digits"), torch.rand(64, 1, 8, 8)
    opened = {}
    for bias in (-2.0, 0.0, 0.5, 2.0):
        network = build_model(TrainConfig(gate=gate, gate_bias=bias), data)
        network(images)
        opened[bias] = torch.cat(list(open_rates(network, "test").values())).mean().item()
    assert opened[-2.0] == 0 and 0.2 < opened[0.0] < 0.8 and opened[0.5] > 0.95 and opened[2.0] == 1
    default = build_model(TrainConfig(gate=gate), data).state_dict()  # as the gates themselves start
    assert all(torch.equal(value, torch.full_like(value, 0.5)) for name, value in default.items() if "fc2.bias" in name)


def test_dense_and_gated_networks_of_a_seed_start_from_the_same_weights():
    data = load_data("digits")
    dense = build_model(TrainConfig(gate="none", seed=3), data)
    gated = build_model(TrainConfig(gate="layer", seed=3), data)
    other = build_model(TrainConfig(gate="layer", seed=4), data)
    for name, value in dense.state_dict().items():
        assert torch.equal(gated.state_dict()[name], value), name
    assert not torch.equal(other.conv1.weight, dense.conv1.weight)


def test_the_first_layer_of_the_fast_network_whitens_the_training_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 26, 26), dtype=torch.uint8, generator=generator)
    labels = torch.arange(64) % 4
    data = make_image_data("test", (images, labels), (images, labels), Augment())
    config = TrainConfig(model="cifar_vgg", gate="channel", position="middle", hidden=8, temperature=0.5)
    gated, dense = build_model(config, data), build_model(config, data, gated=False)
    seen = EvalBatches(data, "train").first(64)
    out = dense.whiten(seen).movedim(1, 3).reshape(-1, 24)[:, :12]
    assert (out.T @ out / len(out) - torch.eye(12)).abs().max() < 0.01  # eps of the variances
    assert torch.equal(gated.whiten.weight, dense.whiten.weight)
    assert gated.group1.channel_gate.estimator.temperature == 0.5 and gated.group1.channel_gate.fc1.out_features == 8
