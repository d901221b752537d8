"""The measured networks, dense and compact; built from a seed, with norms like those of a trained network."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gatedconv

VARIANTS = ("dense", "mid-50", "half the blocks")


@dataclass(frozen=True)
class NetworkCase:
    """A network, what was removed from it, and its batch.

    Attributes:
        model: one of `gatedconv.models` (32x32), or "resnet18" or "resnet50" (224x224, torchvision's).
        variant: "dense"; "mid-50": without half of the channels between a block's first and last convolution;
            "half the blocks": every second block is left with its shortcut.
        batch: images per call.
        quick: whether it belongs to the short selection.
    """

    model: str
    variant: str
    batch: int
    quick: bool = False

    @property
    def name(self) -> str:
        """The name in result rows."""
        return f"{self.model} {self.variant}"

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return 32 if hasattr(gatedconv.models, self.model) else 224

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network in eval mode and its input (N, 3, H, W)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = _cifar(self.model, self.variant) if self.image_size == 32 else _imagenet(self.model, self.variant)
            return network.eval(), torch.randn(self.batch, 3, self.image_size, self.image_size)


def _cases() -> tuple[NetworkCase, ...]:
    quick = {("resnet56", variant, batch) for variant in VARIANTS for batch in (1, 32)} | {("resnet18", "mid-50", 1)}
    small = itertools.product(("resnet56", "resnet110"), VARIANTS, (1, 8, 32))
    large = itertools.product(("resnet18", "resnet50"), VARIANTS[:2], (1, 8))
    wanted = itertools.chain(small, large)
    return tuple(NetworkCase(model, kind, batch, (model, kind, batch) in quick) for model, kind, batch in wanted)


CASES = _cases()


def _cifar(model: str, variant: str) -> nn.Module:
    gate = {"dense": None, "mid-50": "channel", "half the blocks": "layer"}[variant]
    network = getattr(gatedconv.models, model)(gate=gate, position="middle" if gate == "channel" else "after")
    fill_norms(network)
    network.eval()
    if gate is None:
        return network
    masks = {
        name: half_open(found.num_gates) if gate == "channel" else torch.tensor([index % 2 == 0])
        for index, (name, found) in enumerate(gatedconv.gates(network).items())
    }
    return gatedconv.compact(gatedconv.freeze(network, masks=masks), torch.zeros(1, 3, 32, 32))


def _imagenet(model: str, variant: str) -> nn.Module:
    import torchvision

    network: nn.Module = getattr(torchvision.models, model)(weights=None)
    fill_norms(network)
    return network.eval() if variant == "dense" else half_inside(network.eval(), torch.zeros(1, 3, 224, 224))


def half_inside(network: nn.Module, x: Tensor) -> nn.Module:
    """The network without half of the channels that no sum reads: inside of blocks, or of a stem; at random."""
    gated = gatedconv.gate_model(network, gate="channel", position="middle", example_input=x)
    masks = {name: half_open(gate.num_gates) for name, gate in gatedconv.gates(gated).items()}
    return gatedconv.compact(gatedconv.freeze(gated, masks=masks), x)


def half_open(count: int) -> Tensor:
    """Bool (count,) with half of the entries open, at random places."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count)[: count // 2]] = True
    return mask


@torch.no_grad()
def fill_norms(network: nn.Module) -> None:
    """Give BatchNorm2d statistics that are neither 0 nor 1, and each branch a small share of the stream."""
    for name, norm in network.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.uniform_(0.5, 1.0)
            norm.bias.normal_(0, 0.2)
            if name.endswith(("bn2", "bn3")):
                norm.weight.mul_(0.3)
