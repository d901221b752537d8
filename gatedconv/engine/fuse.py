"""Fuses layers: norms into convolutions, activations and additions into what computes their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from gatedconv.engine.layers import Layer, map_size

_NORMS = ("layer_norm", "group_norm")
_TAKES_ACT = ("conv", "affine", "add", "multiply", "scatter_add", "max_pool", "avg_pool", "mean_pool", "fill", *_NORMS)
_TAKES_VALUE = ("leaky_relu", "elu")  # activations with a number of their own, for which a norm has no room


def fuse(layers: list[Layer], result: fx.Node, change_inputs: bool = False) -> list[Layer]:
    """Return fewer layers that compute the same.

    Args:
        layers: Of a segment.
        result: The segment's output.
        change_inputs: Fuse a gate, a norm or an activation on the input of a 1x1 convolution into it.
    """
    fused: list[Layer] = []
    producer: dict[fx.Node, Layer] = {}

    def private(node: fx.Node) -> Layer | None:
        """The layer that makes a node, if the current layer is its only reader."""
        return producer.get(node) if len(node.users) == 1 and node is not result else None

    def remove(layer: Layer) -> None:
        fused[:] = [other for other in fused if other is not layer]

    def remove_unread(node: fx.Node) -> None:
        """Remove what makes a node that nothing reads any more, and what only that reads."""
        while (layer := private(node)) is not None and layer.residual is layer.gate is None:
            remove(layer)
            if len(layer.inputs) > 1:
                break
            (node,) = layer.inputs

    for layer in layers:
        before = private(layer.inputs[0])
        if layer.kind == "conv" and before is not None and before.kind == "pad":
            remove(before)
            layer.padding = tuple(map(sum, zip(layer.padding, before.padding, strict=True)))  # type: ignore[assignment]
            layer.inputs = before.inputs
            before = private(layer.inputs[0])
        while change_inputs and before is not None and _change_input(layer, before):
            remove(before)
            before = private(layer.inputs[0])
        if (
            before is not None
            and before.kind == "pixel_shuffle"
            and _fuse_before_shuffle(private(before.inputs[0]), layer)
        ):
            target = before
        elif layer.kind == "affine" and before is not None and _fold_affine(before, layer):
            target = before
        elif layer.kind == "act" and before is not None and _take_act(before, layer):
            target = before
        elif layer.kind == "act" and layer.act == "relu" and _is_rectified(layer.inputs[0], producer):
            layer.kind = "alias"
            fused.append(layer)
            target = layer
        elif layer.kind == "alias" and before is not None and "flattened" not in layer.output.meta:
            target = before
        elif layer.kind == "add" and (zeros := _zeros(layer, private)) is not None:
            assert layer.residual is not None
            other = layer.residual if zeros is layer.inputs[0] else layer.inputs[0]
            remove_unread(zeros)
            layer.kind, layer.inputs, layer.residual = "alias", [other], None
            fused.append(layer)
            target = layer
        elif layer.kind == "add" and (scatter := _scattered(layer, private)) is not None:
            remove(scatter)
            scatter.residual = layer.residual if scatter.output is layer.inputs[0] else layer.inputs[0]
            fused.append(scatter)
            target = scatter
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


def _zeros(add: Layer, private: Callable[[fx.Node], Layer | None]) -> fx.Node | None:
    """The operand of an addition that is zero everywhere, as a closed branch leaves it."""
    assert add.residual is not None
    if add.residual is add.inputs[0] or map_size(add.residual) != map_size(add.inputs[0]):
        return None
    for node in (add.inputs[0], add.residual):
        layer = private(node)
        if layer is not None and layer.kind == "fill" and layer.act in (None, "relu"):
            assert layer.bias is not None
            if not bool(layer.bias.any()):
                return node
    return None


def _is_rectified(node: fx.Node, producer: dict[fx.Node, Layer]) -> bool:
    """Whether a ReLU made the map behind a node."""
    layer = producer.get(node)
    while layer is not None and layer.kind == "alias":
        layer = producer.get(layer.inputs[0])
    return layer is not None and layer.act == "relu"


def _fuse_before_shuffle(conv: Layer | None, layer: Layer) -> bool:
    """Fuse what follows a pixel shuffle into the convolution in front of it; whether it could be."""
    if conv is None or conv.kind != "conv":
        return False
    if layer.kind == "affine":
        assert layer.weight is not None and layer.bias is not None and conv.weight is not None
        phases = len(conv.weight) // len(layer.weight)
        each = replace(layer, weight=layer.weight.repeat_interleave(phases), bias=layer.bias.repeat_interleave(phases))
        return _fold_affine(conv, each)
    return layer.kind == "act" and _take_act(conv, layer)


def _take_act(layer: Layer, act: Layer) -> bool:
    """Fuse an activation into what makes its input; whether it could be."""
    if layer.kind not in _TAKES_ACT or layer.act is not None:
        return False
    one_number = layer.kind in _NORMS or (layer.before is not None and layer.before[2] in _TAKES_VALUE)
    if one_number and act.act in _TAKES_VALUE:
        return False
    layer.act = act.act
    if act.act in _TAKES_VALUE:
        layer.value = act.value
    return True


def _change_input(conv: Layer, before: Layer) -> bool:
    """Let a 1x1 convolution take over the layer in front of it: a product with a pixel, a norm, an activation."""
    if conv.kind != "conv" or conv.groups != 1 or conv.kernel != (1, 1) or any(conv.padding) or conv.gate is not None:
        return False
    assert conv.weight is not None
    channels = conv.weight.shape[1]
    if before.kind == "multiply" and before.residual is not None and before.act is None:
        if conv.residual is not None or map_size(before.residual) != (channels, 1, 1):
            return False
        if map_size(before.inputs[0])[1:] == (1, 1):
            return False
        conv.gate = before.residual
    elif before.kind in ("affine", "act") and conv.before is None:
        ones = torch.ones(channels, dtype=torch.float64, device="cpu")
        scale = ones if before.weight is None else before.weight
        conv.before = (scale, 0 * ones if before.bias is None else before.bias, before.act)
        conv.value = before.value
    else:
        return False
    conv.inputs = [before.inputs[0]]
    return True


def _fold_affine(conv: Layer, affine: Layer) -> bool:
    if conv.kind not in ("conv", "affine") or conv.act is not None or conv.residual is not None:
        return False
    assert conv.weight is not None and affine.weight is not None and affine.bias is not None
    conv.weight = conv.weight * affine.weight.view(-1, *[1] * (conv.weight.dim() - 1))
    conv.bias = affine.bias if conv.bias is None else conv.bias * affine.weight + affine.bias
    return True


def _scattered(add: Layer, private: Callable[[fx.Node], Layer | None]) -> Layer | None:
    """The scattered channels among constants that an addition can do without storing them."""
    assert add.residual is not None
    if add.residual is add.inputs[0] or map_size(add.residual) != map_size(add.inputs[0]):
        return None
    for node in (add.inputs[0], add.residual):
        layer = private(node)
        if layer is not None and layer.kind == "scatter_add" and layer.residual is None and layer.act is None:
            return layer
    return None


def _absorbing(add: Layer, private: Callable[[fx.Node], Layer | None], fused: list[Layer]) -> Layer | None:
    """The convolution that an addition can join: the later one, so that the other operand is there."""
    assert add.residual is not None
    if add.residual is add.inputs[0] or map_size(add.residual) != map_size(add.inputs[0]):
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
    """An affine, an activation or a border that nothing could absorb is a depthwise convolution of one pixel."""
    if layer.kind == "affine":
        assert layer.weight is not None
        layer.groups = layer.weight.numel()
        layer.weight = layer.weight[:, None, None, None]
        layer.kind = "conv"
    elif layer.kind in ("act", "pad"):
        channels = map_size(layer.inputs[0])[0]
        layer.groups = channels
        layer.weight = torch.ones(channels, 1, 1, 1, dtype=torch.float64, device="cpu")
        layer.kind = "conv"
    return layer
