"""What is checked of an experiment before it is trained, and of its run before it gets a row."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from gatedconv.data import DataError, ImageData, validation_view
from gatedconv.measure.macs import count_macs
from gatedconv.train.build import load_images, phases, starting_network
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.folder import RunFolder
from reproduce.files import dataset_name
from reproduce.ledger import LedgerRow
from reproduce.table import Experiment

_AWAY = "move the run folder away to run it again"


class Images(NamedTuple):
    """What a data set's name stands for: shape (C, H, W), and how many images; val of a split of its own."""

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    val: int = 0


KNOWN_IMAGES = {
    "cifar10": Images((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": Images((3, 32, 32), 100, 50_000, 10_000),
    "cifar10-16x16-25k": Images((3, 16, 16), 10, 25_000, 10_000, 15_000),
}
# How far a control's MACs may be from its gated network's, relatively. The same gates have the same MACs; an even share
# of layer gates, 54 in ResNet-110, comes as close as half of one.
MACS_APART = {"fixed_at_init": 0.01, "equal_macs": 0.03}
_WHY_APART = {
    "fixed_at_init": "the consensus, or the row, is another run's",
    "equal_macs": "the row is another run's, or no even share of these gates comes closer",
}


def require_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which is made where it is missing: before hours of training.

    Raises:
        OSError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{folder}: expected a folder that files can be written to ({reason})") from None


def known_images(source: str, config: TrainConfig) -> ImageData:
    """The images of a run, which have to be those that the ledger names.

    Args:
        source: `data` of the experiment, whose name the ledger tells.
        config: of the run, whose `data` may lie anywhere.

    Raises:
        DataError: there are other images under that name, or see `load_images`.
    """
    data, name = load_images(replace(config, evaluate_on="test")), dataset_name(source)
    val = 0 if data.val_labels is None else len(data.val_labels)
    found = Images(data.image_shape, data.num_classes, len(data.train_labels), len(data.test_labels), val)
    wanted = KNOWN_IMAGES.get(name, found)
    if found != wanted:
        raise DataError(
            f"{config.data}: expected {name}, {_told(wanted)}, found {_told(found)}: the ledger would have other "
            "images under that name"
        )
    return data if config.evaluate_on == "test" else validation_view(data, config.val_fraction, config.split_seed)


def _told(images: Images) -> str:
    shape = "x".join(map(str, images.shape))
    return (
        f"{images.train:,} train, {images.val:,} val and {images.test:,} test images of {shape} in "
        f"{images.classes} classes"
    )


def require_fit(experiment: Experiment, config: TrainConfig, data: ImageData, whole: LedgerRow | None) -> None:
    """Check before a control is trained that it has the MACs of what it is compared with.

    Args:
        experiment: of the run.
        config: of the run.
        data: its images.
        whole: row of the run that it is made from; None for those that are made from none.

    Raises:
        ValueError: see `require_macs`, `starting_network`.
    """
    if whole is not None and experiment.kind in MACS_APART:
        network = starting_network(config, data, phases(config)[0])
        require_macs(experiment, count_macs(network, torch.zeros(1, *data.image_shape)), whole)


def require_macs(experiment: Experiment, macs: float, whole: LedgerRow) -> None:
    """Check that a control has the MACs of the gated run that it is made from.

    Raises:
        ValueError: they are further apart than the kind of control makes them.
    """
    apart = MACS_APART.get(experiment.kind)
    if apart is not None and abs(macs - whole.macs) > apart * whole.macs:
        raise ValueError(
            f"{experiment.name}: expected the MACs of {experiment.needs}, seed {whole.seed}, within {apart:.0%}: "
            f"{whole.macs:,.0f} in the ledger; found {macs:,.0f}: {_WHY_APART[experiment.kind]}"
        )


def require_whole(folder: RunFolder, config: TrainConfig) -> None:
    """Check that a run's metrics tell of each epoch of its recipe, once.

    Raises:
        ValueError: they do not, or cannot be read.
    """
    wanted = [(phase, epoch + 1) for phase in phases(config) for epoch in range(*epoch_range(config, phase))]
    found = [(line.phase, line.epoch) for line in folder.read_metrics()]
    if sorted(found) != sorted(wanted):
        # `gatedconv freeze` concludes a run that was cut short, too.
        unfinished = len(set(found)) == len(found) and set(found) < set(wanted)
        go_on = f"take {folder.summary.name} away to go on with it from its checkpoint, or " if unfinished else ""
        raise ValueError(
            f"{folder.metrics}: expected a line for each of {len(wanted)} epochs, found {len(found)} lines of "
            f"{len(set(found) & set(wanted))} of them; {go_on}{_AWAY}"
        )
    told = folder.read_summary().get("epochs")
    counts = {phase: sum(each == phase for each, _ in wanted) for phase in phases(config)}
    if told != counts:
        raise ValueError(f"{folder.summary}: epochs: expected {counts}, found {told}; {_AWAY}")
