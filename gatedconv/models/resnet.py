"""CIFAR ResNets (He et al. 2016, section 4.2) with optional gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedconv import ops
from gatedconv._checks import require_choice
from gatedconv.gating import ESTIMATORS, ChannelGate, LayerGate, MacTerm, forget
from gatedconv.gating.gates import POOLS
from gatedconv.gating.mac_terms import conv_macs, norm_macs, params_of
from gatedconv.nn.block import GATES, POSITIONS, BasicBlock
from gatedconv.nn.skip import has_hooks
from gatedconv.ops.estimate import DEFAULT_TEMPERATURE

WIDTHS = (16, 32, 64)


class ResNet(nn.Module):
    """6n+2 layers: a 3x3 stem, three stages of n ``BasicBlock`` at 16, 32, 64 channels, pool, fc.

    Build it through ``resnet20`` ... ``resnet110``, which document the arguments.

    Attributes:
        config: the constructor's arguments and the builder's name, all of them JSON types.
        mac_terms: where the model's MACs are and which gates scale them; see ``MacTerm``.

    Shape: (N, C, H, W) -> logits (N, num_classes); any H and W, unless a gate flattens its input.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        gate: str | None = None,
        position: str = "after",
        shortcut: str = "B",
        *,
        estimator: str = "ste",
        temperature: float = DEFAULT_TEMPERATURE,
        hidden: int | None = 16,
        pool: str = "avg",
        input_size: tuple[int, int, int] = (3, 32, 32),
    ) -> None:
        super().__init__()
        _check(depth, num_classes, gate, position, shortcut, estimator, hidden, pool, input_size)
        self.config: dict[str, Any] = {
            "name": f"resnet{depth}",
            "num_classes": num_classes,
            "gate": gate,
            "position": position,
            "shortcut": shortcut,
            "estimator": estimator,
            "temperature": temperature,
            "hidden": hidden,
            "pool": pool,
            "input_size": list(input_size),
        }
        channels, height, width = self.input_size = tuple(input_size)
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        in_channels = WIDTHS[0]
        for stage, out_channels in enumerate(WIDTHS, start=1):
            blocks = []
            for index in range((depth - 2) // 6):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(self._block(in_channels, out_channels, stride, (height, width)))
                in_channels, height, width = out_channels, -(-height // stride), -(-width // stride)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.mac_terms: list[MacTerm] = _resnet_mac_terms(self)

    def _block(self, in_channels: int, channels: int, stride: int, size: tuple[int, int]) -> BasicBlock:
        options = self.config
        gate, position = options["gate"], options["position"]
        head = {"estimator": options["estimator"], "temperature": options["temperature"]}
        layer_gate = channel_gate = None
        if gate in ("layer", "both"):
            layer_gate = LayerGate(in_channels, hidden=options["hidden"], **head)
        if gate in ("channel", "both"):
            read = in_channels if position == "before" else channels
            shrink = 1 if position == "before" else stride
            feature_size = -(-size[0] // shrink) * -(-size[1] // shrink)
            channel_gate = ChannelGate(
                read, hidden=options["hidden"], pool=options["pool"], feature_size=feature_size, **head
            )
        return BasicBlock(
            in_channels,
            channels,
            stride,
            shortcut=options["shortcut"],
            position=position,
            layer_gate=layer_gate,
            channel_gate=channel_gate,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify: x (N, C, H, W) -> logits (N, num_classes)."""
        if self.training:
            forget(self)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self._stages(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits

    def _stages(self, x: Tensor) -> Tensor:
        """The residual blocks; where kernels run in training, each block passes its output's mean to the next."""
        if not (self.training and ops.kernels_run_on(x)) or torch.compiler.is_compiling():
            x = self.layer3(self.layer2(self.layer1(x)))
            return x
        mean = None
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in [stage] if has_hooks(stage) else stage:
                if has_hooks(block):
                    x, mean = block(x), None
                else:
                    x, mean = block.forward(x, mean, True)
        return x


def _resnet_mac_terms(model: ResNet) -> list[MacTerm]:
    """Terms for one image of ``model.input_size``; gates' own dense layers are not part of them."""
    _, height, width = model.input_size
    terms = [
        MacTerm(
            conv_macs(model.conv1, height * width) + norm_macs(model.bn1, height * width),
            params_of(model.conv1, model.bn1),
        )
    ]
    for stage in ("layer1", "layer2", "layer3"):
        for index, block in enumerate(getattr(model, stage)):
            stride = block.conv1.stride[0]
            height, width = -(-height // stride), -(-width // stride)
            terms += _block_terms(f"{stage}.{index}", block, height * width)
    pooled = model.fc.in_features * height * width
    terms.append(MacTerm(pooled + model.fc.in_features * model.fc.out_features, params_of(model.fc)))
    return terms


def _block_terms(name: str, block: BasicBlock, pixels: int) -> list[MacTerm]:
    layer = (f"{name}.layer_gate",) if block.layer_gate is not None else ()
    channel = (f"{name}.channel_gate",) if block.channel_gate is not None else ()
    gates = {
        part: layer + (channel if block.position in positions else ())
        for part, positions in {
            "conv1": ("before", "middle"),
            "bn1": ("middle",),
            "conv2": ("middle", "after"),
            "bn2": ("after",),
        }.items()
    }
    terms = [
        MacTerm(conv_macs(block.conv1, pixels), params_of(block.conv1), gates["conv1"]),
        MacTerm(norm_macs(block.bn1, pixels), params_of(block.bn1), gates["bn1"]),
        MacTerm(conv_macs(block.conv2, pixels), params_of(block.conv2), gates["conv2"]),
        MacTerm(norm_macs(block.bn2, pixels), params_of(block.bn2), gates["bn2"]),
    ]
    if isinstance(block.downsample, nn.Sequential):
        conv, norm = block.downsample
        terms.append(MacTerm(conv_macs(conv, pixels) + norm_macs(norm, pixels), params_of(conv, norm)))
    return terms


def _check(
    depth: int,
    num_classes: int,
    gate: str | None,
    position: str,
    shortcut: str,
    estimator: str,
    hidden: int | None,
    pool: str,
    input_size: tuple[int, int, int],
) -> None:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"ResNet: depth must be 6n + 2 with n >= 1, got {depth}")
    if num_classes < 1:
        raise ValueError(f"ResNet: num_classes must be at least 1, got {num_classes}")
    require_choice("ResNet", "gate", gate, (None, *GATES))
    require_choice("ResNet", "position", position, POSITIONS)
    require_choice("ResNet", "shortcut", shortcut, ("A", "B"))
    require_choice("ResNet", "estimator", estimator, ESTIMATORS)
    require_choice("ResNet", "pool", pool, POOLS)
    if hidden is not None and hidden < 1:
        raise ValueError(f"ResNet: hidden must be a positive int or None, got {hidden!r}")
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"ResNet: input_size must be (C, H, W), all positive, got {input_size!r}")


def resnet20(
    num_classes: int = 10, gate: str | None = None, position: str = "after", shortcut: str = "B", **options: Any
) -> ResNet:
    """ResNet-20 for small images; the other depths differ in nothing else.

    Args:
        num_classes: rows of the last layer.
        gate: None, "layer", "channel" or "both".
        position: of the channel gates in a block: "before", "middle" or "after".
        shortcut: where shapes change, "B" (1x1 convolution and BatchNorm) or "A" (padding).
        **options: ``estimator`` ("ste", "gumbel", "bernoulli", "batch_mean"), ``temperature`` (of the
            Gumbel-softmax), ``hidden`` (units of the gates' hidden layer; None: single dense layer in
            channel gates), ``pool`` ("avg" or "flatten" input of channel gates), ``input_size``
            ((C, H, W), default (3, 32, 32), at which MACs are counted).

    Raises:
        ValueError: for any value outside these sets.
    """
    return ResNet(20, num_classes, gate, position, shortcut, **options)


def resnet32(
    num_classes: int = 10, gate: str | None = None, position: str = "after", shortcut: str = "B", **options: Any
) -> ResNet:
    """ResNet-32; arguments as in ``resnet20``."""
    return ResNet(32, num_classes, gate, position, shortcut, **options)


def resnet44(
    num_classes: int = 10, gate: str | None = None, position: str = "after", shortcut: str = "B", **options: Any
) -> ResNet:
    """ResNet-44; arguments as in ``resnet20``."""
    return ResNet(44, num_classes, gate, position, shortcut, **options)


def resnet56(
    num_classes: int = 10, gate: str | None = None, position: str = "after", shortcut: str = "B", **options: Any
) -> ResNet:
    """ResNet-56; arguments as in ``resnet20``."""
    return ResNet(56, num_classes, gate, position, shortcut, **options)


def resnet110(
    num_classes: int = 10, gate: str | None = None, position: str = "after", shortcut: str = "B", **options: Any
) -> ResNet:
    """ResNet-110; arguments as in ``resnet20``."""
    return ResNet(110, num_classes, gate, position, shortcut, **options)
