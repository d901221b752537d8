"""A training step of ours beside a plain PyTorch loop, on one CPU thread: ``python -m benchmarks.training_cpu``.

Both make the same batches of the same images; ours keeps metrics, checks for bad steps and serves the gates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from gatedconv.data import ImageData, TrainBatches
from gatedconv.data.image_data import Augment, make_image_data
from gatedconv.train.build import build_model
from gatedconv.train.config import TrainConfig
from gatedconv.train.metrics import EpochMeter
from gatedconv.train.provenance import commit, versions
from gatedconv.train.recipe import make_optimizer, place
from gatedconv.train.step import Stepper

RESULTS = Path(__file__).parent / "results" / "training-cpu.json"
CASES = (("resnet20", 16, "bf16"), ("resnet20", 16, "off"), ("resnet56", 32, "bf16"))


def noise(side: int) -> ImageData:
    """Images of noise: their content costs nothing and changes nothing."""
    images = torch.randint(256, (512, 3, side, side), dtype=torch.uint8)
    split = images, torch.arange(512) % 10
    return make_image_data("noise", split, split, Augment(pad=side // 8, flip=True))


def our_step(config: TrainConfig, data: ImageData) -> Callable[[], Any]:
    """A step of `Stepper` with its metrics, on batches made as in training."""
    model = place(build_model(config, data), config).train()
    stepper, meter = Stepper(model, config, torch.device("cpu")), EpochMeter(model)
    batches = endless(data, config)

    def step() -> None:
        images, labels = next(batches)
        result = stepper(images, labels, 0.5)
        meter.add(result.logits, labels, result.loss, result.polarization, result.bad)

    return step


def plain_step(config: TrainConfig, data: ImageData) -> Callable[[], Any]:
    """What a tutorial would write, in the fastest settings that we know of."""
    model = place(build_model(config, data), config).train()
    optimizer, batches = make_optimizer(model, config), endless(data, config)

    def step() -> None:
        images, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.amp == "bf16"):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def endless(data: ImageData, config: TrainConfig) -> Any:
    """Batches of pass after pass."""
    batches = TrainBatches(data, config.batch_size, memory_format=torch.channels_last)
    while True:
        yield from batches


def measure(network: str, side: int, amp: str, rounds: int) -> dict[str, Any]:
    """Both loops in turns; the ratio is the median of the rounds' ratios of CPU time."""
    config = TrainConfig(model=network, gate="none", amp=amp, batch_size=128, device="cpu")
    data = noise(side)
    steps = {"plain": plain_step(config, data), "ours": our_step(config, data)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            started = time.process_time()  # other work on the machine is not ours
            step()
            if turn >= 2:
                times[name].append(1000 * (time.process_time() - started))
    ratios = [ours / plain for plain, ours in zip(times["plain"], times["ours"], strict=True)]
    return {
        "network": f"{network}, {side}x{side}",
        "batch": 128,
        "dtype": "bfloat16 autocast" if amp == "bf16" else "float32",
        "plain_ms": round(min(times["plain"]), 3),
        "ours_ms": round(min(times["ours"]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "rounds": rounds,
    }


def main() -> None:
    """Measure every case and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [measure(network, side, amp, rounds) for network, side, amp in CASES]
    for row in rows:
        print(row)
    found = {"commit": commit(), "versions": versions(), "threads": 1, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
