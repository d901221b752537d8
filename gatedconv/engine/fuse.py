"""Fuses layers: norms into convolutions, activations and additions into what computes their input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from gatedconv.engine.layers import Layer

_TAKES_ACT = ("conv", "add", "scatter_add", "max_pool", "avg_pool", "fill")


def fuse(layers: list[Layer], result: fx.Node) -> list[Layer]:
    """Return fewer layers that compute the same; `result` is the segment's output."""
    fused: list[Layer] = []
    producer: dict[fx.Node, Layer] = {}

    def private(node: fx.Node) -> Layer | None:
        """The layer that makes a node, if nobody but the layer at hand reads it."""
        return producer.get(node) if len(node.users) == 1 and node is not result else None

    for layer in layers:
        before = private(layer.inputs[0])
        if layer.kind == "affine" and before is not None and _fold_affine(before, layer):
            target = before
        elif layer.kind == "act" and before is not None and before.kind in _TAKES_ACT and before.act is None:
            before.act = layer.act
            target = before
        elif layer.kind == "add" and (last := _absorbing(layer, private, fused)) is not None:
            assert layer.residual is not None
            # Either operand may be the one whose convolution takes the sum; the other becomes its residual.
            last.residual = layer.residual if last.output is layer.inputs[0] else layer.inputs[0]
            target = last
        else:
            fused.append(layer)
            target = layer
        target.output = layer.output
        producer[layer.output] = target
    return [_as_depthwise(layer) for layer in fused]


def _fold_affine(conv: Layer, affine: Layer) -> bool:
    if conv.kind != "conv" or conv.act is not None or conv.residual is not None:
        return False
    assert conv.weight is not None and affine.weight is not None and affine.bias is not None
    conv.weight = conv.weight * affine.weight[:, None, None, None]
    conv.bias = affine.bias if conv.bias is None else conv.bias * affine.weight + affine.bias
    return True


def _absorbing(add: Layer, private: Callable[[fx.Node], Layer | None], fused: list[Layer]) -> Layer | None:
    """The convolution that an addition can join: the later one, so that the other operand is there."""
    assert add.residual is not None
    if add.residual is add.inputs[0]:
        return None
    found = [
        (layer, other)
        for node, other in ((add.inputs[0], add.residual), (add.residual, add.inputs[0]))
        if (layer := private(node)) is not None
        and layer.kind == "conv"
        and layer.act is None
        and layer.residual is None
    ]
    position = {id(layer): i for i, layer in enumerate(fused)}
    made = {layer.output: i for i, layer in enumerate(fused)}
    for layer, other in found:
        if made.get(other, -1) < position[id(layer)]:
            return layer
    return None


def _as_depthwise(layer: Layer) -> Layer:
    """An affine or an activation that nothing could absorb is a depthwise convolution of one pixel."""
    if layer.kind == "affine":
        assert layer.weight is not None
        layer.groups = layer.weight.numel()
        layer.weight = layer.weight[:, None, None, None]
        layer.kind = "conv"
    elif layer.kind == "act":
        channels = int(layer.inputs[0].meta["tensor_meta"].shape[1])
        layer.groups = channels
        layer.weight = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
        layer.kind = "conv"
    return layer
