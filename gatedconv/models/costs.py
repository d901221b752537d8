"""The MACs of a CIFAR ResNet piece by piece, by fvcore's rules, each with the gates that scale it.

fvcore counts a convolution or linear layer as its multiply-accumulates, a BatchNorm in eval as 2 per
element, adaptive pooling as 1 per input element, and ReLU and additions as nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from gatedconv.gating import MacTerm
from gatedconv.nn.block import BasicBlock

if TYPE_CHECKING:
    from gatedconv.models.resnet import ResNet


def resnet_mac_terms(model: ResNet) -> list[MacTerm]:
    """Terms for one image of ``model.input_size``; gates' own dense layers are not part of them."""
    _, height, width = model.input_size
    terms = [
        MacTerm(
            _conv(model.conv1, height * width) + _norm(model.bn1, height * width),
            _params(model.conv1, model.bn1),
        )
    ]
    for stage in ("layer1", "layer2", "layer3"):
        for index, block in enumerate(getattr(model, stage)):
            stride = block.conv1.stride[0]
            height, width = -(-height // stride), -(-width // stride)
            terms += _block_terms(f"{stage}.{index}", block, height * width)
    pooled = model.fc.in_features * height * width
    terms.append(MacTerm(pooled + model.fc.in_features * model.fc.out_features, _params(model.fc)))
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
        MacTerm(_conv(block.conv1, pixels), _params(block.conv1), gates["conv1"]),
        MacTerm(_norm(block.bn1, pixels), _params(block.bn1), gates["bn1"]),
        MacTerm(_conv(block.conv2, pixels), _params(block.conv2), gates["conv2"]),
        MacTerm(_norm(block.bn2, pixels), _params(block.bn2), gates["bn2"]),
    ]
    if isinstance(block.downsample, nn.Sequential):
        conv, norm = block.downsample
        terms.append(MacTerm(_conv(conv, pixels) + _norm(norm, pixels), _params(conv, norm)))
    return terms


def _conv(conv: nn.Module, pixels: int) -> float:
    return _weight_count(conv) * pixels


def _weight_count(layer: nn.Module) -> float:
    return float(dict(layer.named_parameters())["weight"].numel())


def _norm(norm: nn.Module, pixels: int) -> float:
    return 2 * _weight_count(norm) * pixels


def _params(*modules: nn.Module) -> int:
    return sum(
        p.numel() for module in modules for name, p in module.named_parameters() if "gate." not in name
    )
