"""Epochs and steps of training as the tests make them, on the CPU and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedconv.data import ImageData
from gatedconv.train import EpochMetrics, TrainConfig, step
from gatedconv.train.loop import Training
from gatedconv.train.metrics import EpochMeter
from gatedconv.train.skip_dead import BlockSkipping
from gatedconv.train.step import Stepper

Batch = tuple[Tensor, Tensor, "Tensor | None", float]  # images, labels, a teacher's logits, epoch


def train(
    model: nn.Module, data: ImageData, config: TrainConfig, *, resume: bool = False, **options: Any
) -> Iterator[EpochMetrics]:
    """Train a network in place with the options of `Training`; each item taken from the iterator is an epoch."""
    return Training(model, data, config, **options).epochs(resume)


def set_predict_skips(monkeypatch: pytest.MonkeyPatch, predict: bool) -> None:
    """Steppers that are made afterwards skip the blocks that the previous step decides on, as on a GPU, or do not."""
    monkeypatch.setattr(step, "BlockSkipping", partial(BlockSkipping, predict=predict))


def make_steps(
    kind: type[Stepper],
    model: nn.Module,
    config: TrainConfig,
    batches: Iterable[Batch],
    *,
    evaluation: int,
    broken: int | None,
    **options: Any,
) -> tuple[Stepper, EpochMeter]:
    """A step for each batch, an evaluation before step ``evaluation``, and NaN for the images of step ``broken``."""
    device = next(model.parameters()).device
    meter = EpochMeter(model, device)

    def observe(result: Any, labels: Tensor) -> None:
        meter.add(result.logits, labels, result.loss, result.polarization, result.open_rates, result.bad)

    stepper = kind(model, config, device, observe=observe, **options)
    stepper._immediate = False  # bad steps are judged as on a GPU
    with stepper.active():
        for number, (images, labels, teacher_logits, epoch) in enumerate(batches):
            if number == evaluation:
                with torch.no_grad():
                    model.eval()(images)
                model.train()
            stepper(images * math.nan if number == broken else images, labels, epoch, teacher_logits)
            stepper.guard.repair()
    return stepper, meter
