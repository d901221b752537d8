"""From a config to the things that it names: images, and a network that fits them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gatedconv import models
from gatedconv.data import ImageData, load_data, validation_view
from gatedconv.deploy import compact, freeze
from gatedconv.gating import find_gates
from gatedconv.gating.gate import LearnedGate
from gatedconv.models import ResNet
from gatedconv.train.config import TrainConfig
from gatedconv.train.masks import even_masks, read_consensus


def load_images(config: TrainConfig) -> ImageData:
    """The images of a run: with `evaluate_on = "val"`, the validation split stands in for the test split.

    Raises:
        DataError: the source is unknown, missing, damaged or not of the expected form.
    """
    data = load_data(
        config.data,
        root=config.data_root,
        seed=config.split_seed,
        image_size=config.image_size,
        workers=config.workers if config.stream else None,
    )
    if config.evaluate_on == "val":
        return validation_view(data, config.val_fraction, config.split_seed)
    return data


def build_model(config: TrainConfig, data: ImageData, *, gated: bool = True) -> ResNet:
    """The network of a run with fresh weights, drawn from the run's seed.

    Dense and gated networks of one seed start from the same weights, gates aside.

    Args:
        config: names the network and its gates.
        data: gives the number of classes and the image size.
        gated: False for the dense network of the same recipe.
    """
    torch.manual_seed(config.seed)
    builder = getattr(models, config.model)
    size = data.image_shape
    dense: ResNet = builder(data.num_classes, shortcut=config.shortcut, input_size=size)
    if not gated or config.gate == "none":
        return dense
    network: ResNet = builder(
        data.num_classes,
        config.gate,
        config.position,
        config.shortcut,
        estimator=config.estimator,
        temperature=config.temperature,
        hidden=config.hidden or None,
        pool=config.pool,
        input_size=size,
    )
    network.load_state_dict(dense.state_dict(), strict=False)
    for gate in find_gates(network).values():
        assert isinstance(gate, LearnedGate)  # it is new
        nn.init.constant_(gate.fc2.bias, config.gate_bias)
    return network


def starting_network(config: TrainConfig, data: ImageData, phase: str) -> nn.Module:
    """What a training begins with: the dense network, the gated one, or the sub-network that `config` names.

    Raises:
        ValueError: the sub-network is that of another network, or its file cannot be read.
    """
    if not config.subnetwork:
        return build_model(config, data, gated=phase == "gated")
    gated = build_model(config, data)
    if config.subnetwork == "even":
        masks = even_masks(gated, config.mac_target)
    else:
        masks = read_consensus(Path(config.subnetwork))[0].masks
    try:
        frozen = freeze(gated, masks=masks)
    except (ValueError, TypeError) as error:
        found = f"{config.subnetwork}: not a part of {config.model} with these gates"
        raise ValueError(f"subnetwork: {found}: {error}") from None
    return compact(frozen.eval(), torch.zeros(1, *data.image_shape)).train()


def phases(config: TrainConfig) -> tuple[str, ...]:
    """The trainings of a run, in order: "dense", "gated" or both, and "cut" where the consensus comes early."""
    if config.gate == "none" or config.subnetwork:
        return ("dense",)
    dense = ("dense",) if config.dense_baseline else ()
    return (*dense, "gated", "cut") if config.consensus_at < 1 else (*dense, "gated")
