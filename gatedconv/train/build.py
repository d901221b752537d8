"""From a config to the things that it names: images, and a network that fits them."""

from __future__ import annotations

import torch

from gatedconv import models
from gatedconv.data import ImageData, load_data, validation_view
from gatedconv.models import ResNet
from gatedconv.train.config import TrainConfig


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
    return network


def phases(config: TrainConfig) -> tuple[str, ...]:
    """The trainings of a run, in order: "dense", "gated" or both."""
    if config.gate == "none":
        return ("dense",)
    return ("dense", "gated") if config.dense_baseline else ("gated",)
