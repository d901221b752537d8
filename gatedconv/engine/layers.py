"""The layers of a plan before it is packed, and what the values between them are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

Pair = tuple[int, int]


@dataclass
class Layer:
    """One instruction of a plan before it is packed.

    Attributes:
        kind: "conv", "affine" (scale and shift per channel), "act", "prelu", "add", "multiply", "scatter_add",
            "gather", "cat", "slice", "subsample", "fill" (a constant per channel), "max_pool", "avg_pool", "mean_pool",
            "adaptive_max_pool", "adaptive_avg_pool", "nearest", "bilinear", "pixel_shuffle", "layer_norm",
            "group_norm", "softmax", "pad" (zeros around a map) or "alias" (a view of the same map).
        name: The module or function it came from.
        inputs: The maps it reads; of "add", "multiply" and "scatter_add" the other operand is `residual`, which the
            last may lack: its channels are then placed among the constants `bias`.
        output: The node whose value it makes.
        kernel: Kernel, or the size of an adaptive pooling's output, or the factor of "nearest", "bilinear" and
            "pixel_shuffle".
        padding: Pixels at the top, left, bottom and right.
        groups: Of a convolution or a group norm.
        weight: (C_out, C_in / groups, KH, KW); (C,) for "affine" and norms; float64.
        bias: (C_out,), float64; the slopes of "prelu".
        act: Name of an activation (`gatedconv.engine.plan_writer.ACTS`) or None.
        value: Slope or alpha of the activation.
        epsilon: Of a norm.
        residual: The other operand; of "nearest" and "bilinear" the map whose size is wanted.
        gate: A map (N, C, 1, 1) that the input of a 1x1 convolution is multiplied by.
        before: Scale and shift of a 1x1 convolution's input, float64, and the activation that follows.
        index: Channel list of "gather" and "scatter_add".
        offset: Channels in front of "subsample"; the first channel of "slice".
        counts_padding: Whether "avg_pool" divides by the window with its padding.
        rounds_up: Whether "avg_pool" and "max_pool" round the size of their output up.
        aligns_corners: Whether "bilinear" aligns the corners.
    """

    kind: str
    name: str
    inputs: list[fx.Node]
    output: fx.Node
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    act: str | None = None
    value: float = 0.0
    epsilon: float = 0.0
    residual: fx.Node | None = None
    gate: fx.Node | None = None
    before: tuple[Tensor, Tensor, str | None] | None = None
    index: list[int] = field(default_factory=list)
    offset: int = 0
    counts_padding: bool = False
    rounds_up: bool = False
    aligns_corners: bool = False


def size_of(node: Any, larger: bool = False) -> tuple[int, ...] | None:
    """Return the shape of a node's value for two images of the example's size; None where it is unknown.

    Args:
        node: A node, or anything else, whose shape is unknown.
        larger: For images larger than the example; None, too, if the model takes none.
    """
    if not isinstance(node, fx.Node):
        return None
    shape = node.meta.get("larger_shape") if larger else getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Return the `size_of` a node's value, None if it is no float32 tensor."""
    meta: Any = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return size_of(node) if getattr(meta, "dtype", None) == torch.float32 else None


def is_map(node: Any) -> bool:
    """Whether a node's value is a batch of feature maps (2, C, H, W), the batch of the recorded run."""
    shape = shape_of(node)
    return shape is not None and len(shape) == 4 and shape[0] == 2 and min(shape) > 0 and not is_nhwc(node)


def is_nhwc(node: fx.Node) -> bool:
    """Whether a node's value is a map whose axes were permuted to (2, H, W, C)."""
    return bool(node.meta.get("nhwc"))


def is_vector(node: Any) -> bool:
    """Whether a node's value is a batch of vectors (2, C)."""
    shape = shape_of(node)
    return shape is not None and len(shape) == 2 and shape[0] == 2 and min(shape) > 0


def map_size(node: fx.Node) -> tuple[int, int, int]:
    """Return channels, height and width of the map that a node's value is stored as."""
    shape = (*node.meta["tensor_meta"].shape, 1, 1)
    return (shape[3], shape[1], shape[2]) if is_nhwc(node) else (shape[1], shape[2], shape[3])


def is_stored(node: Any) -> bool:
    """Whether a plan has a map for a node's value."""
    return is_map(node) or is_vector(node) or (isinstance(node, fx.Node) and is_nhwc(node))


_CUDA_KINDS = frozenset("conv affine act add scatter_add gather subsample max_pool avg_pool mean_pool alias".split())


def runs_on_cuda(layer: Layer) -> bool:
    """Whether `CudaPlan` runs a layer."""
    if layer.kind not in _CUDA_KINDS or layer.act not in (None, "relu", "relu6"):
        return False
    whole = layer.kind != "add" or shape_of(layer.residual) == shape_of(layer.inputs[0])
    if layer.rounds_up:
        return False
    if layer.kind in ("gather", "scatter_add"):
        whole = is_map(layer.inputs[0]) and (layer.kind == "gather" or layer.residual is not None)
    return whole and not any(is_nhwc(node) for node in (*layer.inputs, layer.output))
