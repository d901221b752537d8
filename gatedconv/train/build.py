"""From a config to images, and to a network that fits them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv import models
from gatedconv.data import EvalBatches, ImageData, load_data, validation_view
from gatedconv.deploy import compact, freeze
from gatedconv.gating import find_gates, masks_for_target
from gatedconv.gating.gates import LearnedGate
from gatedconv.models import CifarVGG, ResNet
from gatedconv.train.checkpoint import read_consensus
from gatedconv.train.config import TrainConfig
from gatedconv.train.options import DataOptions

Network = ResNet | CifarVGG
# Of the whitening: the covariance of 2 x 2 patches has 12 rows, and each image has hundreds of patches.
_WHITENING_IMAGES = 2000


def load_images(options: DataOptions) -> ImageData:
    """The images of a run: with `evaluate_on = "val"`, the validation split replaces the test split.

    Raises:
        DataError: the source is unknown, missing, damaged or not of the expected form.
    """
    data = load_data(
        options.data,
        root=options.data_root,
        seed=options.split_seed,
        image_size=options.image_size,
        workers=options.workers if options.stream else None,
        image_range=options.image_range,
    )
    if options.evaluate_on == "val":
        return validation_view(data, options.val_fraction, options.split_seed)
    return data


def build_model(config: TrainConfig, data: ImageData, *, gated: bool = True) -> Network:
    """The network of a run with fresh weights, drawn from the run's seed.

    Dense and gated networks of one seed start from the same weights, gates aside. A first layer that whitens is set
    from training images.

    Args:
        config: has the network and its gates.
        data: has the number of classes and the image size.
        gated: False for the dense network of the same recipe.
    """
    torch.manual_seed(config.seed)
    builder = getattr(models, config.model)
    common: dict[str, Any] = {"num_classes": data.num_classes, "input_size": data.image_shape}
    of_gates: dict[str, Any] = {"gate": config.gate, "hidden": config.hidden or None}
    of_gates |= {"estimator": config.estimator, "temperature": config.temperature}
    if config.model != "cifar_vgg":
        common |= {"shortcut": config.shortcut}
        of_gates |= {"position": config.position, "pool": config.pool}
    dense: Network = builder(**common)
    if isinstance(dense, CifarVGG):
        dense.init_whitening(EvalBatches(data, "train").first(min(_WHITENING_IMAGES, len(data.train_images))))
    if not gated or config.gate == "none":
        return dense
    network: Network = builder(**common, **of_gates)
    network.load_state_dict(dense.state_dict(), strict=False)
    for gate in find_gates(network).values():
        assert isinstance(gate, LearnedGate)  # it is new
        nn.init.constant_(gate.fc2.bias, config.gate_bias)
    return network


def starting_network(config: TrainConfig, data: ImageData, phase: str) -> nn.Module:
    """The network that a phase starts with: dense, gated, or the sub-network that `config` names.

    Raises:
        ValueError: the sub-network belongs to another network, or its file cannot be read.
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
    """The phases of a run, in order: "dense", "gated" or both; "compact" where training continues with that network."""
    if config.gate == "none" or config.subnetwork:
        return ("dense",)
    dense = ("dense",) if config.dense_baseline else ()
    return (*dense, "gated", "compact") if config.consensus_at < 1 else (*dense, "gated")


def even_masks(model: nn.Module, target: float) -> dict[str, Tensor]:
    """Uniform masks for control runs: the same share of every gate open, at ``target`` of the MACs.

    Closed layer gates are spread evenly over the network.
    """
    scores = {}
    for index, (name, gate) in enumerate(find_gates(model).items()):
        within = (torch.arange(gate.num_gates, dtype=torch.float64) + 0.5) / gate.num_gates
        scores[name] = within + 1e-6 * _spread(index + 1)
    return masks_for_target(model, scores, target)


def _spread(index: int) -> float:
    """Van der Corput's sequence 1/2, 1/4, 3/4, 1/8, ...: its first terms, however many, cover [0, 1] evenly."""
    value, unit = 0.0, 0.5
    while index:
        value += unit * (index & 1)
        index, unit = index >> 1, unit / 2
    return value
