"""Checks of an experiment before it trains, and of its run before it gets a row in the ledger."""

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
from gatedconv.train.run_dir import RunFolder
from reproduce.experiment import Experiment
from reproduce.ledger import LedgerRow
from reproduce.workplace import dataset_name

_AWAY = "move the run folder away to run it again"


class Images(NamedTuple):
    """A data set: shape (C, H, W), number of classes, and images of each split."""

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    val: int = 0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        counts = f"{self.train:,} train, {self.val:,} val and {self.test:,} test images"
        return f"{counts} of {shape} in {self.classes} classes"


KNOWN_IMAGES = {
    "cifar10": Images((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": Images((3, 32, 32), 100, 50_000, 10_000),
    "cifar10-16x16-25k": Images((3, 16, 16), 10, 25_000, 10_000, 15_000),
}
# Largest relative difference between the MACs of a control and of its gated network. The same gates have equal MACs; an
# even share of layer gates, 54 in ResNet-110, is off by at most half a gate.
MACS_APART = {"fixed_at_init": 0.01, "equal_macs": 0.03, "taught_before": 0.03}
_EVEN = "the row is of another run, or no even share of these gates is closer"
_WHY_APART = {
    "fixed_at_init": "the consensus, or the row, is of another run",
    "equal_macs": _EVEN,
    "taught_before": _EVEN,
}


def require_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which is made where it is missing.

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
    """The images of a run, checked to be those of the data set that the ledger will name.

    Args:
        source: `data` of the experiment.
        config: of the run; its `data` may be in another place.

    Raises:
        DataError: the images differ from those known by that name; or see `load_images`.
    """
    data, name = load_images(replace(config, evaluate_on="test")), dataset_name(source)
    val = 0 if data.val_labels is None else len(data.val_labels)
    found = Images(data.image_shape, data.num_classes, len(data.train_labels), len(data.test_labels), val)
    wanted = KNOWN_IMAGES.get(name, found)
    if found != wanted:
        raise DataError(
            f"{config.data}: expected {name}, {wanted}, found {found}: the ledger would have other images under that "
            "name"
        )
    return data if config.evaluate_on == "test" else validation_view(data, config.val_fraction, config.split_seed)


def require_fit(experiment: Experiment, config: TrainConfig, data: ImageData, gated: LedgerRow | None) -> None:
    """Check before a control trains that it has the MACs of the gated run that it is derived from.

    Args:
        experiment: of the run.
        config: of the run.
        data: its images.
        gated: row of that gated run; None for experiments that are derived from none.

    Raises:
        ValueError: see `require_macs`, `starting_network`.
    """
    if gated is not None and experiment.kind in MACS_APART:
        network = starting_network(config, data, phases(config)[0])
        require_macs(experiment, count_macs(network, torch.zeros(1, *data.image_shape)), gated)


def require_macs(experiment: Experiment, macs: float, gated: LedgerRow) -> None:
    """Check that a control has the MACs of the gated run that it is derived from.

    Raises:
        ValueError: they differ by more than `MACS_APART`.
    """
    apart = MACS_APART.get(experiment.kind)
    if apart is not None and abs(macs - gated.macs) > apart * gated.macs:
        raise ValueError(
            f"{experiment.name}: expected the MACs of {experiment.needs}, seed {gated.seed}, within {apart:.0%}: "
            f"{gated.macs:,.0f} in the ledger; found {macs:,.0f}: {_WHY_APART[experiment.kind]}"
        )


def require_complete(folder: RunFolder, config: TrainConfig) -> None:
    """Check that a run's metrics have every epoch of its recipe, once.

    Raises:
        ValueError: they do not, or cannot be read.
    """
    wanted = [(phase, epoch + 1) for phase in phases(config) for epoch in range(*epoch_range(config, phase))]
    found = [(line.phase, line.epoch) for line in folder.read_metrics()]
    if sorted(found) != sorted(wanted):
        # `gatedconv freeze` writes the summary of an interrupted run, too.
        unfinished = len(set(found)) == len(found) and set(found) < set(wanted)
        resume = f"remove {folder.summary.name} to resume it from its checkpoint, or " if unfinished else ""
        raise ValueError(
            f"{folder.metrics}: expected a line for each of {len(wanted)} epochs, found {len(found)} lines of "
            f"{len(set(found) & set(wanted))} of them; {resume}{_AWAY}"
        )
    recorded = folder.read_summary().get("epochs")
    counts = {phase: sum(each == phase for each, _ in wanted) for phase in phases(config)}
    if recorded != counts:
        raise ValueError(f"{folder.summary}: epochs: expected {counts}, found {recorded}; {_AWAY}")
