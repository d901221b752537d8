"""Gate a network by swapping one class: `gatedconv.Conv2d` in place of `torch.nn.Conv2d`.

    python examples/swap_conv2d.py [--quick]

Trains a small network on scikit-learn's digits for some seconds. Half of its multiply-accumulates are pruned on the
way, and the frozen network computes no others.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import gatedconv


def network() -> nn.Sequential:
    """Two gated convolutions behind a plain one; no norm follows them, which would make constants of zeros."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        gatedconv.Conv2d(32, 64, 3, stride=2, padding=1, gate="channel"),
        nn.ReLU(),
        gatedconv.Conv2d(64, 64, 3, padding=1, gate="channel"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that the model classifies correctly."""
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, freeze, compact, and print what is left."""
    torch.manual_seed(0)
    bunch = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    model = network().train()
    gatedconv.attach_macs(model, images[:2])
    optimizer, pruner = torch.optim.Adam(model.parameters(), 3e-3), gatedconv.GatePruner(model)
    epochs, step = 2 if "--quick" in sys.argv else 20, 0
    for _ in range(epochs):
        for index in torch.randperm(1437).split(64):
            loss = functional.cross_entropy(model(images[index]), labels[index])
            loss = loss + 3 * gatedconv.polarization_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            pruner.step(gatedconv.schedules.falling(step / (epochs * 23), 0.5, 0.3, 0.7))  # half of the MACs are left
    pruner.finish(0.5)
    frozen = gatedconv.freeze(model, images[:1437].split(64))
    small = gatedconv.compact(frozen, images[:2])
    print(f"agreement of the images: {frozen.consensus.agreement:.1%}")
    for name, net in (("gated", model), ("frozen", frozen), ("compact", small)):
        macs = gatedconv.count_macs(net.eval(), images[:1]) / 1e3
        print(f"{name:<8} top-1 {top1(net, images[1437:], labels[1437:]):5.1f} %, {macs:6.0f} k MACs")


if __name__ == "__main__":
    main()
