"""Epochs of our training loop and of a plain PyTorch loop, on a CPU: ``python -m benchmarks.training_cpu``.

The plain loop is the fastest that we could write: a plain ResNet, one gather that crops and flips, channels_last, a
fused optimizer, no metrics but the top-1 of the evaluation. It shares no code with ours. Whole epochs are timed,
interleaved. A gated network is compared with a plain one that has the gates and the loss of the paper, and with the
network without gates. It has no teacher.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import machine_header, write_result
from benchmarks.roofline import epoch_ms, layer_work, measured_rates
from gatedconv.data import ImageData
from gatedconv.data.image_data import Augment, make_image_data
from gatedconv.measure.latency import Interleaved
from gatedconv.train import TrainConfig
from gatedconv.train.build import build_model
from gatedconv.train.config import make_config
from gatedconv.train.loop import Training
from gatedconv.train.presets import preset_settings

RESULTS = Path(__file__).parent / "results" / "training-cpu.json"
WHAT = """Milliseconds per step of whole epochs, evaluation included, interleaved with the fastest plain loop that we
could write, which shares no code with ours; {threads} threads, {steps} steps an epoch. The plain loop of a gated
network has gates as in the paper and no more: ours also ranks them and follows a MAC target. The roofline is the time
that the convolutions and linear layers need at the rates of large products and a large copy on the same machine."""
# Network, side of the images, gated, amp, compiled.
CASES = (
    ("resnet20", 32, False, "bf16", False),
    ("resnet20", 32, True, "bf16", False),
    ("resnet56", 32, False, "bf16", False),
    ("resnet56", 32, True, "bf16", False),
    ("resnet20", 32, False, "off", False),
    ("resnet20", 32, False, "bf16", True),
    ("resnet20", 32, True, "bf16", True),
)
BATCH, TEST_BATCH, PAD = 128, 500, 4


class PlainGate(nn.Module):
    """Table 2 of the paper, right column, on the average of each channel: a decision per sample and channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 16)
        self.norm = nn.BatchNorm1d(16)
        self.fc2 = nn.Linear(16, channels)
        nn.init.normal_(self.fc2.weight, std=0.1 / 4)
        nn.init.constant_(self.fc2.bias, 0.5)
        self.polar = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in channels_last -> the same, closed channels 0; keeps its term of equations 6 to 8."""
        with torch.autocast("cpu", enabled=False):
            # Summed over dimensions that are neighbors in memory: the gradient of a mean comes in another order.
            pooled = x.permute(0, 2, 3, 1).sum((1, 2), dtype=torch.float32) / (x.shape[2] * x.shape[3])
            logits = self.fc2(functional.relu_(self.norm(self.fc1(pooled))))
            soft = logits.clamp(-1, 1)
            gate = (logits > 0).float() + (soft - soft.detach())
            rate = gate.mean(0)
            self.polar = (rate * (1 - rate)).mean()
        return x * gate.to(x.dtype)[:, :, None, None]


class PlainBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, on request a gate between the two."""

    def __init__(self, inputs: int, outputs: int, stride: int, gated: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.gate = PlainGate(outputs) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H', W')."""
        y = functional.relu_(self.bn1(self.conv1(x)))
        y = y if self.gate is None else self.gate(y)
        y = self.bn2(self.conv2(y)).add_(x if self.shortcut is None else self.shortcut(x))
        return functional.relu_(y)


def plain_resnet(depth: int, classes: int = 10, gated: bool = False) -> nn.Module:
    """The CIFAR ResNet with projections where shapes change, on request with gates in the middle of blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    inputs = 16
    for outputs in (16, 32, 64):
        for index in range((depth - 2) // 6):
            layers.append(PlainBlock(inputs, outputs, 2 if index == 0 and outputs > 16 else 1, gated))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


class PlainImages:
    """uint8 images, padded once; a batch is one gather, in channels_last."""

    def __init__(self, images: Tensor, labels: Tensor, pad: int) -> None:
        self.labels, self.size, self.pad = labels, images.shape[2], pad
        self.pixels = functional.pad(images, (pad,) * 4).permute(0, 2, 3, 1).contiguous()
        self.mean = images.float().mean((0, 2, 3)).view(1, -1, 1, 1)
        self.scale = 1 / images.float().std((0, 2, 3)).view(1, -1, 1, 1)

    def train_batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, cropped, flipped batches of an epoch."""
        along = torch.arange(self.size)
        for chosen in torch.randperm(len(self.labels))[: len(self.labels) // batch * batch].split(batch):
            top, left = torch.randint(2 * self.pad + 1, (2, batch, 1))
            columns = torch.where(torch.rand(batch, 1) < 0.5, along, along.flip(0)) + left
            crop = self.pixels[chosen[:, None, None], (along + top)[:, :, None], columns[:, None]]
            yield self.normalized(crop), self.labels[chosen]

    def test_batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order."""
        yield from zip(map(self.normalized, self.pixels.split(batch)), self.labels.split(batch), strict=True)

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H, W, C) -> float32 (N, C, H, W) in channels_last."""
        return pixels.permute(0, 3, 1, 2).to(torch.float32).sub_(self.mean).mul_(self.scale)


def plain_epochs(depth: int, data: ImageData, amp: str, compiled: bool, gated: bool = False) -> Iterator[float]:
    """Train an epoch for every item taken, and evaluate; yields the top-1 in percent."""
    model: nn.Module = plain_resnet(depth, gated=gated)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    gates = [module for module in model.modules() if isinstance(module, PlainGate)]
    run: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    images = PlainImages(data.train_images, data.train_labels, PAD)  # type: ignore[arg-type]
    test = PlainImages(data.test_images, data.test_labels, 0)  # type: ignore[arg-type]
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16")
    while True:
        model.train()
        for x, y in images.train_batches(BATCH):
            with mixed:
                loss = functional.cross_entropy(run(x), y)
            if gates:
                loss = loss + torch.stack([gate.polar for gate in gates]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        model.eval()
        right = 0
        with torch.no_grad(), mixed:
            for x, y in test.test_batches(TEST_BATCH):
                right += int((run(x).argmax(1) == y).sum())
        yield 100 * right / len(test.labels)


def our_epochs(network: str, data: ImageData, amp: str, gated: bool, compiled: bool, epochs: int) -> Iterator[float]:
    """The same by `gatedconv.train`, by our recipe."""
    settings = preset_settings("best-c10-r56") | {
        "model": network,
        "epochs": epochs,
        "batch_size": BATCH,
        "pad": PAD,
        "amp": amp,
        "compile": compiled,
        "device": "cpu",
        "teacher_at": 1.0,
    }
    if not gated:
        settings |= {"gate": "none", "mac_control": "none", "consensus_at": 1.0}
    config: TrainConfig = make_config(settings)
    training = Training(build_model(config, data), data, config, phase="gated" if gated else "dense")
    for metrics in training.epochs(resume=False):
        yield metrics.test_top1


def noise(side: int, train_images: int, test_images: int) -> ImageData:
    """Images of noise: their content costs nothing and changes nothing."""
    splits = [
        (torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.arange(count) % 10)
        for count in (train_images, test_images)
    ]
    return make_image_data("noise", splits[0], splits[1], Augment(pad=PAD, flip=True))


def measure(case: tuple[str, int, bool, str, bool], rounds: int, steps: int) -> dict[str, Any]:
    """Interleaved epochs of the loops; the ratio is the median of the rounds' ratios."""
    network, side, gated, amp, compiled = case
    data = noise(side, steps * BATCH, max(2, steps * BATCH // 5))  # as many to a test image as in CIFAR-10
    depth = int(network.removeprefix("resnet"))
    loops = {"plain": plain_epochs(depth, data, amp, compiled, gated)}
    if gated:
        loops["ungated"] = plain_epochs(depth, data, amp, compiled)
    # Gates end where 70 % of a run is done; the epochs that are measured come before.
    loops["ours"] = our_epochs(network, data, amp, gated, compiled, 2 * rounds + 2)
    calls = {name: partial(next, epochs) for name, epochs in loops.items()}
    timing = Interleaved(calls, sample_ms=0.0, warmup=1, lead_in=0, wait=False)  # the first epoch may compile
    for _ in range(rounds):
        timing.round()
    least = {name: timing.least[name] / steps for name in loops}
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    work = layer_work(plain_resnet(depth), torch.zeros(1, *data.image_shape))
    rates = measured_rates(torch.device("cpu"), dtype)
    ideal = epoch_ms(work, BATCH, steps, len(data.test_images), dtype.itemsize, rates) / steps
    row = {
        "network": f"{network}, {side}x{side}" + (", gated" if gated else "") + (", compiled" if compiled else ""),
        "batch": BATCH,
        "dtype": "bfloat16 autocast" if amp == "bf16" else "float32",
        "plain_ms": round(least["plain"], 3),
        "ours_ms": round(least["ours"], 3),
        "ratio": round(timing.ratio("ours", "plain").median, 4),
        "roofline": round(ideal / least["ours"], 4),
        "rounds": rounds,
    }
    if gated:
        row["ungated_ms"] = round(least["ungated"], 3)
        row["ungated_ratio"] = round(timing.ratio("ours", "ungated").median, 4)
    return row


def main(arguments: list[str] | None = None, show: Callable[[Any], object] = print) -> None:
    """Measure every case and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loop")
    parser.add_argument("--steps", type=int, default=20, help="steps of an epoch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", type=int, action="append", help="number of a case; all without")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    rows = []
    for number in range(len(CASES)) if chosen.case is None else chosen.case:
        rows.append(measure(CASES[number], chosen.rounds, chosen.steps))
        show(rows[-1])
    what = WHAT.format(threads=chosen.threads, steps=chosen.steps)
    found = {"machine": machine_header(chosen.threads), "what": what, "rows": rows}
    write_result(chosen.out, found)


if __name__ == "__main__":
    main()
