"""From config to network: every field about gates arrives."""

from __future__ import annotations

import torch

import gatedconv
from gatedconv.data import load_data
from gatedconv.train.build import build_model
from gatedconv.train.config import TrainConfig


def test_every_gate_setting_reaches_the_network():
    config = TrainConfig(
        gate="channel", position="before", estimator="gumbel", temperature=0.5, hidden=8, pool="flatten",
        shortcut="A", model="resnet32",
    )  # fmt: skip
    network = build_model(config, load_data("digits"))
    assert network.config | {"num_classes": 10, "input_size": [1, 8, 8]} == network.config
    gate = gatedconv.gates(network)["layer1.0.channel_gate"]
    assert gate.estimator.temperature == 0.5 and gate.fc1.out_features == 8
    assert gate.fc1.in_features == 16 * 8 * 8 and network.layer1[0].position == "before"
    assert network.config["name"] == "resnet32" and network.config["shortcut"] == "A"


def test_dense_and_gated_networks_of_a_seed_start_from_the_same_weights():
    data = load_data("digits")
    dense = build_model(TrainConfig(gate="none", seed=3), data)
    gated = build_model(TrainConfig(gate="layer", seed=3), data)
    other = build_model(TrainConfig(gate="layer", seed=4), data)
    for name, value in dense.state_dict().items():
        assert torch.equal(gated.state_dict()[name], value), name
    assert not torch.equal(other.conv1.weight, dense.conv1.weight)
