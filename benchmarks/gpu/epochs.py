"""Stage ``bench-epochs``: whole epochs of our recipe, evaluation included, and their share of the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.stages import Case, stage
from benchmarks.roofline import Rates, epoch_ms, layer_work, measured_rates
from gatedconv.data import ImageData
from gatedconv.data.image_data import Augment, make_image_data
from gatedconv.train import TrainConfig, train
from gatedconv.train.build import build_model
from gatedconv.train.config import make_config
from gatedconv.train.presets import preset_settings

EPOCHS = 300  # of a run, which the note speaks of
MEASURED = 3  # after one that warms up
NO_GATE = {"gate": "none", "mac_control": "none", "consensus_at": 1.0, "teacher_at": 1.0}
# What is trained: changes to the preset. The teacher is another network, trained beside; here from the start.
NETS: dict[str, dict[str, Any]] = {
    "resnet56": NO_GATE,
    "resnet56 channel gates": {"teacher_at": 1.0},
    "resnet56 channel gates, taught": {"teacher_at": 0.0},
}
PROVIDERS: dict[str, dict[str, Any]] = {"gatedconv graph": {"cuda_graph": True}, "gatedconv": {}}
SECONDS = {"gatedconv graph": 40.0, "gatedconv": 90.0}


@stage("bench-epochs", baseline="gatedconv")
def bench_epochs(session: Session) -> Iterator[Case]:
    """bfloat16, then float32; graphs first: they are what runs are made with."""
    for provider in PROVIDERS:
        for amp in ("bf16", "off"):
            for name in NETS:
                yield epochs_case(session.dry, name, amp, provider)


def epochs_case(dry: bool, name: str, amp: str, provider: str) -> Case:
    """The median of some epochs in milliseconds; the note tells how long a run takes and its share of the roofline."""
    settings = preset_settings("best-c10-r56") | {"epochs": EPOCHS, "amp": amp} | NETS[name] | PROVIDERS[provider]
    if dry:
        settings |= {"model": "resnet20", "batch_size": 16, "device": "cpu", "cuda_graph": False, "threads": 1}
    else:
        settings |= {"device": "cuda"}
    config = make_config(settings)
    dtype = "bfloat16" if amp == "bf16" else "float32"
    key = ("epoch", name, config.batch_size, dtype, provider)
    return Case(
        key, SECONDS[provider], lambda: measured(config, noise(8, 48, 16) if dry else noise(32, 50_000, 10_000))
    )


def noise(side: int, train_images: int, test_images: int) -> ImageData:
    """As many images as CIFAR-10 has; their content changes nothing."""
    splits = [
        (torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.arange(count) % 10)
        for count in (train_images, test_images)
    ]
    return make_image_data("noise", splits[0], splits[1], Augment(pad=side // 8, flip=True))


def measured(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Fields of a row."""
    model = build_model(config, data)
    work = layer_work(model, torch.zeros(1, *data.image_shape)) * (2 if config.teacher_at < 1 else 1)
    epochs, times = train(model, data, config, phase="dense" if config.gate == "none" else "gated"), []
    for number in range(MEASURED + 1):
        seconds = next(epochs).seconds
        if number:
            times.append(1000 * seconds)
    dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32
    steps, tests = len(data.train_images) // config.batch_size, len(data.test_images)
    ideal = epoch_ms(work, config.batch_size, steps, tests, dtype.itemsize, rates(config.device, dtype))
    median = statistics.median(times)
    minutes = EPOCHS * median / 60_000
    note = (
        f"{median / steps:.2f} ms a step, {minutes:.1f} min for {EPOCHS} epochs, {ideal / median:.1%} of the roofline"
    )
    return {"ms_median": median, "ms_min": min(times), "ratio": ideal / median, "rounds": len(times), "note": note}


@cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """What the device does at best."""
    return measured_rates(torch.device(device), dtype, 0 if device == "cuda" else 128)
