"""A fast network for small images: a patch-whitening first layer and three groups of two convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedconv import ops
from gatedconv._checks import require_choice
from gatedconv.gating import ESTIMATORS, ChannelGate, FrozenGate, MacTerm, forget
from gatedconv.gating.gates import Gate
from gatedconv.gating.mac_terms import conv_macs, norm_macs, params_of
from gatedconv.nn import Conv2d
from gatedconv.ops.estimate import DEFAULT_TEMPERATURE

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
WIDTHS = (64, 256, 256)


class VGGGroup(nn.Module):
    """conv1 - max pool - norm1 - activation - gate - conv2 - norm2 - activation.

    The channel gate reads the activation in front of conv2 and multiplies it: a closed channel is an exact zero, which
    removes an output of conv1 and an input of conv2.

    Shape: (N, in_channels, H, W) -> (N, channels, H // 2, W // 2).
    """

    channel_gate: Gate | None

    def __init__(self, in_channels: int, channels: int, activation: str, gate: ChannelGate | None) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(channels, momentum=0.4)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels, momentum=0.4)
        self.activation = ACTIVATIONS[activation]()
        self.channel_gate = gate
        for conv in (self.conv1, self.conv2):
            # Channels begin as they are: the identity where there are as many, random filters for the rest.
            nn.init.dirac_(conv.weight[: min(conv.in_channels, conv.out_channels)].data)
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)  # the convolution behind it can scale as well

    def forward(self, x: Tensor) -> Tensor:
        """Run the group: x (N, in_channels, H, W) -> (N, channels, H // 2, W // 2)."""
        gate = self.channel_gate
        if isinstance(gate, FrozenGate):
            h = self._inner(self.conv1.masked_forward(x, gate.mask))
            return self._outer(self.conv2.masked_forward(h, None, gate.mask))
        h = self._inner(self.conv1(x))
        return self._outer(self.conv2(h if gate is None else ops.gated_scale(h, gate(h))))

    def _inner(self, x: Tensor) -> Tensor:
        h: Tensor = self.activation(self.norm1(self.pool(x)))
        return h

    def _outer(self, x: Tensor) -> Tensor:
        h: Tensor = self.activation(self.norm2(x))
        return h


class CifarVGG(nn.Module):
    """The network of `cifar_vgg`, which documents the arguments.

    Attributes:
        config: the builder's name and arguments, all of them JSON types.
        mac_terms: where the model's MACs are and which gates scale them; see ``MacTerm``.

    Shape: (N, C, H, W) -> logits (N, num_classes); H and W from 25 to 48.
    """

    group1: VGGGroup
    group2: VGGGroup
    group3: VGGGroup

    def __init__(
        self,
        num_classes: int = 10,
        gate: str | None = None,
        *,
        activation: str = "gelu",
        estimator: str = "ste",
        temperature: float = DEFAULT_TEMPERATURE,
        hidden: int | None = 16,
        widths: tuple[int, int, int] = WIDTHS,
        input_size: tuple[int, int, int] = (3, 32, 32),
    ) -> None:
        super().__init__()
        _check(num_classes, gate, activation, estimator, input_size)
        self.config: dict[str, Any] = {
            "name": "cifar_vgg",
            "num_classes": num_classes,
            "gate": gate,
            "activation": activation,
            "estimator": estimator,
            "temperature": temperature,
            "hidden": hidden,
            "widths": list(widths),
            "input_size": list(input_size),
        }
        self.input_size = tuple(input_size)
        patches = 2 * 4 * input_size[0]  # each of the 2 x 2 patch's principal components, and its negative
        self.whiten = nn.Conv2d(input_size[0], patches, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.activation = ACTIVATIONS[activation]()
        before = patches
        for number, width in enumerate(widths, start=1):
            options: dict[str, Any] = {"hidden": hidden, "estimator": estimator, "temperature": temperature}
            found = ChannelGate(width, **options) if gate else None
            self.add_module(f"group{number}", VGGGroup(before, width, activation, found))
            before = width
        self.pool = nn.MaxPool2d(3)
        self.fc = nn.Linear(before, num_classes, bias=False)
        self.mac_terms: list[MacTerm] = self._terms()

    @torch.no_grad()
    def init_whitening(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first layer so that its outputs on the 2 x 2 patches of images are uncorrelated, of variance 1.

        Args:
            images: (N, C, H, W) as the network will see them; some thousands suffice.
            eps: added to the variances, so that directions without any are not blown up.

        Raises:
            ValueError: for images of another shape.
        """
        if images.dim() != 4 or images.shape[1] != self.input_size[0]:
            raise ValueError(f"CifarVGG: images must be (N, {self.input_size[0]}, H, W), got {tuple(images.shape)}")
        windows = images.unfold(2, 2, 1).unfold(3, 2, 1).movedim(1, 3)  # (N, H - 1, W - 1, C, 2, 2)
        patches = windows.reshape(-1, self.input_size[0] * 4).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        scaled = (directions / (variances + eps).sqrt()).T.flip(0).reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([scaled, -scaled]))

    def forward(self, x: Tensor) -> Tensor:
        """Classify: x (N, C, H, W) -> logits (N, num_classes)."""
        if self.training:
            forget(self)
        x = self.activation(self.whiten(x))
        x = self.group3(self.group2(self.group1(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1)) / 9
        return logits

    def _terms(self) -> list[MacTerm]:
        height, width = self.input_size[1] - 1, self.input_size[2] - 1
        terms = [MacTerm(conv_macs(self.whiten, height * width), params_of(self.whiten))]
        for number in (1, 2, 3):
            group, full = getattr(self, f"group{number}"), height * width
            height, width = height // 2, width // 2
            gates = (f"group{number}.channel_gate",) if group.channel_gate is not None else ()
            terms += [
                MacTerm(conv_macs(group.conv1, full), params_of(group.conv1), gates),
                MacTerm(norm_macs(group.norm1, height * width), params_of(group.norm1), gates),
                MacTerm(conv_macs(group.conv2, height * width), params_of(group.conv2), gates),
                MacTerm(norm_macs(group.norm2, height * width), params_of(group.norm2)),
            ]
        return [*terms, MacTerm(conv_macs(self.fc, 1), params_of(self.fc))]


def _check(
    num_classes: int, gate: str | None, activation: str, estimator: str, input_size: tuple[int, int, int]
) -> None:
    if num_classes < 1:
        raise ValueError(f"cifar_vgg: num_classes must be at least 1, got {num_classes}")
    require_choice("cifar_vgg", "gate", gate, (None, "channel"))
    require_choice("cifar_vgg", "activation", activation, ACTIVATIONS)
    require_choice("cifar_vgg", "estimator", estimator, ESTIMATORS)
    if len(input_size) != 3 or input_size[0] < 1 or not all(25 <= side <= 48 for side in input_size[1:]):
        raise ValueError(f"cifar_vgg: input_size must be (C, H, W) with H and W from 25 to 48, got {input_size!r}")


def cifar_vgg(num_classes: int = 10, gate: str | None = None, **options: Any) -> CifarVGG:
    """A network that trains on CIFAR in minutes: 118 M MACs at 32 x 32, with the widths of airbench94 (Jordan 2024).

    Call `CifarVGG.init_whitening` with training images before training; the first layer's weights then stay fixed.

    Args:
        num_classes: rows of the last layer.
        gate: None, or "channel" for a gate between the two convolutions of each group.
        **options: ``activation`` ("gelu", "relu" or "silu"), ``estimator``, ``temperature`` and ``hidden`` (as in
            ``resnet20``), ``widths`` (of the three groups) and ``input_size`` ((C, H, W), H and W from 25 to 48,
            default 32).

    Raises:
        ValueError: for any value outside these sets.
    """
    return CifarVGG(num_classes, gate, **options)
