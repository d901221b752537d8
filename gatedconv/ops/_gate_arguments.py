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


def check_gate(x: Tensor, parameters: GateParameters, options: GateOptions, noise: Tensor | None) -> None:
    """Raise TypeError or ValueError, saying what was expected and what came."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"gate: x must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.dim() not in (2, 4):
        raise ValueError(f"gate: x must be (N, C, H, W) or features (N, K), got shape {tuple(x.shape)}")
    if options.estimator not in ESTIMATORS:
        raise ValueError(f"gate: estimator must be one of {', '.join(ESTIMATORS)}, got {options.estimator!r}")
    first = parameters.weight2 if parameters.weight1 is None else parameters.weight1
    features = x.shape[1] * x.shape[2] * x.shape[3] if x.dim() == 4 and options.flatten else x.shape[1]
    if first.dim() != 2 or first.shape[1] != features:
        raise ValueError(
            f"gate: x gives {features} features, the first layer has weight {tuple(first.shape)}"
        )
    expected = (x.shape[0], parameters.weight2.shape[0])
    if noise is not None and noise.shape != expected:
        raise ValueError(f"gate: noise must have shape {expected}, got {tuple(noise.shape)}")
