"""The method in one file: train a gated ResNet-20 on scikit-learn's digits, prune half of its MACs, run what is left.

    python examples/train_loop.py            # a minute or two on two cores
    python examples/train_loop.py --quick    # seconds; shows that it runs, not what it can do
    python examples/train_loop.py --paper    # by the losses of the paper alone, frozen at the end of the run

One run in three parts: the gated network trains while its gates agree on a sub-network; this sub-network is frozen and
compacted; the compact network trains through the rest of the schedule. A dense network trains by the same recipe.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import gatedconv

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, BATCH = 0.1, 0.9, 5e-4, 64
TARGET = 0.5  # share of the dense network's MACs
PRUNE_FROM, PRUNE_TO = 0.2, 0.6  # share of the run between which the gate pruner works
FREEZE_AT = 0.7  # share of the run after which the gates are constants
POLARIZATION = 3.0  # weight of the loss that makes the images agree
ACTIVATION = 0.5  # weight of the activation loss, which closes gates where no pruner does: with --paper


def digits(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 1, 8, 8) in [-1, 1] with their labels (N,)."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(bunch.target)
    return images[:-360][:count], labels[:-360][:count], images[-360:], labels[-360:]


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: images in random order, shifted by up to a pixel each way."""
    for index in torch.randperm(len(images)).split(BATCH):
        if len(index) == BATCH:
            down, right = torch.randint(3, (2,)).tolist()
            padded = functional.pad(images[index], (1, 1, 1, 1), value=-1)
            yield padded[:, :, down : down + 8, right : right + 8], labels[index]


def learning_rate(progress: float) -> float:
    """A linear warm-up over a twentieth of the run, then half a cosine; progress in [0, 1]."""
    return LEARNING_RATE * min(1.0, progress / 0.05) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD without weight decay on gates, since a logit that decays to 0 decides by noise."""
    gates = [p for gate in gatedconv.gates(model).values() for p in gate.parameters()]
    known = {id(p) for p in gates}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": WEIGHT_DECAY},
        {"params": gates, "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], LEARNING_RATE, MOMENTUM, nesterov=True)


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: range, total: int, paper: bool = False) -> None:
    """Train through some epochs of a run of ``total``; a model with gates learns which of them to keep."""
    optimizer, gated = make_optimizer(model), bool(gatedconv.gates(model))
    pruner = gatedconv.GatePruner(model) if gated and not paper else None
    steps = len(data[0]) // BATCH
    for epoch in epochs:
        model.train()
        for step, (images, labels) in enumerate(batches(*data)):
            progress = (epoch + step / steps) / total
            loss = functional.cross_entropy(model(images), labels)
            if gated:  # every sample decides the same
                weight = gatedconv.schedules.rising(progress, POLARIZATION) if paper else POLARIZATION
                loss = loss + weight * gatedconv.polarization_loss(model)
            if gated and paper:
                loss = loss + ACTIVATION * gatedconv.activation_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = learning_rate(progress)
            optimizer.step()
            if pruner is not None:
                pruner.step(gatedconv.schedules.falling(progress, TARGET, PRUNE_FROM, PRUNE_TO))  # least first per MAC
    if pruner is not None:
        pruner.prune(TARGET)
        pruner.detach()


@torch.no_grad()
def row(name: str, model: nn.Module, data: tuple[Tensor, Tensor], network: nn.Module | None = None) -> str:
    """One line of the table: top-1 in percent, MACs of an image, parameters; ``network`` is what an engine runs."""
    counted = (network or model).eval()
    macs, params = gatedconv.count_macs(counted, data[0][:1]), sum(p.numel() for p in counted.parameters())
    top1 = 100 * (model(data[0]).argmax(1) == data[1]).float().mean()
    return f"{name:<24} {top1:6.1f} {macs / 1e6:8.2f} {params / 1e3:8.1f}"


def main() -> None:
    """Train the gated and the dense network, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, four epochs")
    parser.add_argument("--paper", action="store_true", help="the losses of the paper in place of the gate pruner")
    arguments = parser.parse_args()
    total, count = (4, 384) if arguments.quick else (24, 1437)
    torch.manual_seed(0)
    *data, test_images, test_labels = digits(count)
    test, end = (test_images, test_labels), total if arguments.paper else round(FREEZE_AT * total)

    gated = gatedconv.models.resnet20(10, gate="channel", position="middle", input_size=(1, 8, 8))
    train(gated, tuple(data), range(end), total, arguments.paper)
    frozen = gatedconv.freeze(gated, [images for images, _ in batches(*data)])  # each gate by the vote of the images
    gatedconv.re_estimate_batchnorm(frozen, batches(*data))  # statistics without the channels that are gone
    small = gatedconv.compact(frozen, test_images[:2])
    lines = [f"agreement of the gates: {frozen.consensus.agreement:.1%}", row("compact", small, test)]
    if end < total:
        train(small, tuple(data), range(end, total), total)
        lines.append(row("compact, trained further", small, test))
    lines.append(row("the same by Engine", gatedconv.Engine(small.eval(), test_images), test, small))

    dense = gatedconv.models.resnet20(10, input_size=(1, 8, 8))
    train(dense, tuple(data), range(total), total)
    print(f"{'network':<24} {'top-1':>6} {'MACs (M)':>8} {'k params':>8}")
    print(row("dense", dense, test), *lines[1:], lines[0], sep="\n")


if __name__ == "__main__":
    main()
