"""The arguments of a gate, bundled: its parameters, the buffers that training moves, and its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gatedconv.ops.estimate import ESTIMATORS

__all__ = ["GateOptions", "GateOutput", "GateParameters", "GateStatistics", "check_gate"]


class GateParameters(NamedTuple):
    """Weights of a gate; the first four are None where it is a single dense layer (1FC).

    weight1 (H, K), bias1 (H,), norm_weight (H,), norm_bias (H,), weight2 (O, H or K), bias2 (O,).
    """

    weight1: Tensor | None
    bias1: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight2: Tensor
    bias2: Tensor


class GateStatistics(NamedTuple):
    """Buffers that a call in training moves in place; None is not kept.

    mean (H,), var (H,), batches int64 () of the norm; open_rate (O,); threshold (O,), the running batch mean
    of the logits ("batch_mean" alone).
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    open_rate: Tensor | None = None
    threshold: Tensor | None = None


@dataclass(frozen=True)
class GateOptions:
    """How a gate decides.

    Attributes:
        estimator: "ste", "gumbel", "bernoulli" or "batch_mean".
        temperature: of the Gumbel-softmax.
        flatten: take every position of a map as a feature, instead of pooling it.
        training: move ``open_rate`` and ``threshold``, and threshold "batch_mean" at the batch's own mean.
        batch_stats: normalise by the batch's statistics and move the running ones, instead of using those.
        eps: added to the variance.
        norm_momentum: of mean and var; None for a cumulative average.
        momentum: of open_rate and threshold.
        dtype: of the gate; None for x.dtype.
    """

    estimator: str = "ste"
    temperature: float = 2 / 3
    flatten: bool = False
    training: bool = True
    batch_stats: bool = True
    eps: float = 1e-5
    norm_momentum: float | None = 0.1
    momentum: float = 0.1
    dtype: torch.dtype | None = None


class GateOutput(NamedTuple):
    """What a gate decides.

    gate (N, O), exactly 0 or 1; open_rate (O,), its mean over the batch; logits (N, O). All differentiable.
    """

    gate: Tensor
    open_rate: Tensor
    logits: Tensor


def check_gate(
    x: Tensor,
    parameters: GateParameters,
    statistics: GateStatistics,
    options: GateOptions,
    noise: Tensor | None,
) -> None:
    """Raise TypeError or ValueError, saying what was expected and what came."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"gate: x must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() not in (2, 4):
        raise ValueError(f"gate: x must be (N, C, H, W) or features (N, K), got shape {tuple(x.shape)}")
    if options.estimator not in ESTIMATORS:
        raise ValueError(f"gate: estimator must be one of {', '.join(ESTIMATORS)}, got {options.estimator!r}")
    weight1, weight2 = parameters.weight1, parameters.weight2
    first = weight2 if weight1 is None else weight1
    features = x.shape[1] * x.shape[2] * x.shape[3] if x.dim() == 4 and options.flatten else x.shape[1]
    if first.dim() != 2 or first.shape[1] != features:
        raise ValueError(f"gate: x gives {features} features, the first layer has weight {tuple(first.shape)}")
    if weight2.dim() != 2 or (weight1 is not None and weight2.shape[1] != weight1.shape[0]):
        raise ValueError(f"gate: weight2 must have shape (O, {first.shape[0]}), got {tuple(weight2.shape)}")
    _check_tensors(x, parameters, statistics, noise)


def _check_tensors(x: Tensor, parameters: GateParameters, statistics: GateStatistics, noise: Tensor | None) -> None:
    """Shape, kind and device of everything but the weights' shapes."""
    gates, device, kind = (parameters.weight2.shape[0],), x.device, parameters.weight2.dtype
    units = None if parameters.weight1 is None else (parameters.weight1.shape[0],)
    named: list[tuple[str, Tensor | None, tuple[int, ...] | None]] = [
        ("weight2", parameters.weight2, None), ("bias2", parameters.bias2, gates),
        ("open_rate", statistics.open_rate, gates), ("threshold", statistics.threshold, gates),
        ("noise", noise, (x.shape[0], *gates)),
    ]  # fmt: skip
    if units is not None:
        named += [
            ("weight1", parameters.weight1, None), ("bias1", parameters.bias1, units),
            ("norm_weight", parameters.norm_weight, units), ("norm_bias", parameters.norm_bias, units),
            ("mean", statistics.mean, units), ("var", statistics.var, units),
        ]  # fmt: skip
    for name, tensor, shape in named:
        if tensor is None:
            continue
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"gate: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"gate: {name} must be on {device}, as x is, got {tensor.device}")
        if not tensor.is_floating_point():
            raise TypeError(f"gate: {name} must be floating point, got {tensor.dtype}")
    for name, tensor in zip(GateParameters._fields, parameters, strict=True):
        if tensor is not None and tensor.dtype != kind:
            raise TypeError(f"gate: {name} must be {kind}, as weight2 is, got {tensor.dtype}")
