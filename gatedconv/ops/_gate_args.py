"""The arguments of a gate, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gatedconv._checks import require_tensor
from gatedconv.ops import _triton
from gatedconv.ops.estimate import DEFAULT_TEMPERATURE, require_estimator

_MAX_HIDDEN = 128  # units of the hidden layer that fit a kernel's tile


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
        batch_stats: normalize by the batch's statistics and move the running ones, instead of using those.
        eps: added to the variance.
        norm_momentum: of mean and var; None for a cumulative average.
        momentum: of open_rate and threshold.
        dtype: of the gate; None for x.dtype.
    """

    estimator: str = "ste"
    temperature: float = DEFAULT_TEMPERATURE
    flatten: bool = False
    training: bool = True
    batch_stats: bool = True
    eps: float = 1e-5
    norm_momentum: float | None = 0.1
    momentum: float = 0.1
    dtype: torch.dtype | None = None


class GateOutput(NamedTuple):
    """The decision of a gate.

    gate (N, O), exactly 0 or 1; open_rate (O,), its mean over the batch; logits (N, O). All differentiable.
    """

    gate: Tensor
    open_rate: Tensor
    logits: Tensor


def check_gate(
    x: Tensor, parameters: GateParameters, statistics: GateStatistics, options: GateOptions, noise: Tensor | None
) -> None:
    """Raise TypeError or ValueError with what was expected and what was given."""
    require_tensor("gate", "x", x)
    if x.dim() not in (2, 4):
        raise ValueError(f"gate: x must be (N, C, H, W) or features (N, K), got shape {tuple(x.shape)}")
    require_estimator("gate", options.estimator, options.temperature)
    weight1, weight2 = parameters.weight1, parameters.weight2
    first = weight2 if weight1 is None else weight1
    features = x.shape[1] * x.shape[2] * x.shape[3] if x.dim() == 4 and options.flatten else x.shape[1]
    if first.dim() != 2 or first.shape[1] != features:
        raise ValueError(f"gate: x gives {features} features, the first layer has weight {tuple(first.shape)}")
    if weight2.dim() != 2 or (weight1 is not None and weight2.shape[1] != weight1.shape[0]):
        raise ValueError(f"gate: weight2 must have shape (O, {first.shape[0]}), got {tuple(weight2.shape)}")
    _check_tensors(x, parameters, statistics, noise)


def _check_tensors(x: Tensor, parameters: GateParameters, statistics: GateStatistics, noise: Tensor | None) -> None:
    """Check shape, dtype and device of everything but the weights' shapes."""
    gates, device, dtype = (parameters.weight2.shape[0],), x.device, parameters.weight2.dtype
    units = None if parameters.weight1 is None else (parameters.weight1.shape[0],)
    named: list[tuple[str, Tensor | None, tuple[int, ...] | None]] = [
        ("weight2", parameters.weight2, None),
        ("bias2", parameters.bias2, gates),
        ("open_rate", statistics.open_rate, gates),
        ("threshold", statistics.threshold, gates),
        ("noise", noise, (x.shape[0], *gates)),
    ]
    if units is not None:
        named.append(("weight1", parameters.weight1, None))
        named += [(name, getattr(parameters, name), units) for name in ("bias1", "norm_weight", "norm_bias")]
        named += [(name, getattr(statistics, name), units) for name in ("mean", "var")]
    for name, tensor, shape in named:
        if tensor is not None:
            require_tensor("gate", name, tensor, shape, device)
    for name, tensor in zip(GateParameters._fields, parameters, strict=True):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"gate: {name} must be {dtype}, as weight2 is, got {tensor.dtype}")


def require_batch(x: Tensor, parameters: GateParameters, options: GateOptions) -> None:
    """Raise what PyTorch's BatchNorm raises where a single sample has no statistics."""
    if parameters.weight1 is not None and options.batch_stats and x.shape[0] < 2:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{(x.shape[0], parameters.weight1.shape[0])}"
        )


def kernels_support(
    x: Tensor, parameters: GateParameters, statistics: GateStatistics, options: GateOptions, noise: Tensor | None = None
) -> bool:
    """Whether the kernels cover this call: every buffer kept, all in fp32, and no cumulative average."""
    dtypes = _triton.KERNEL_DTYPES
    if not _triton.kernels_run_on(x) or x.dtype not in dtypes or (options.dtype or x.dtype) not in dtypes:
        return False
    if x.numel() == 0 or statistics.open_rate is None or (noise is not None and noise.dtype != torch.float32):
        return False
    kept: list[Tensor | None] = [parameters.weight2, parameters.bias2, statistics.open_rate]
    if options.estimator == "batch_mean":
        kept.append(statistics.threshold)
    if parameters.weight1 is not None:
        if parameters.weight1.shape[0] > _MAX_HIDDEN or options.norm_momentum is None:
            return False
        if statistics.batches is None or statistics.batches.dtype != torch.int64:
            return False
        if options.batch_stats and not options.training:
            return False
        kept += [*parameters[:4], statistics.mean, statistics.var]
    return all(t is not None and t.dtype == torch.float32 and t.is_contiguous() for t in kept)


def empty_decision(
    weight1: Tensor | None, weight2: Tensor, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of a gate's kernels, uninitialized: gate in ``dtype``, open rate, logits, hidden, stat, threshold."""
    gates, hidden, new = weight2.shape[0], 0 if weight1 is None else weight1.shape[0], weight2.new_empty
    gate = new((batch, gates), dtype=dtype)
    return gate, new(gates), new(batch, gates), new(batch, hidden), new(3, hidden), new(gates)


def empty_gradients(weight1: Tensor | None, weight2: Tensor) -> list[Tensor]:
    """The gradients of the six `GateParameters`, uninitialized; those of a layer that is not there are empty."""
    new = weight2.new_empty
    units, d_weight1 = (0, (0, 0)) if weight1 is None else (weight1.shape[0], tuple(weight1.shape))
    return [new(d_weight1), new(units), new(units), new(units), new(weight2.shape), new(weight2.shape[0])]
