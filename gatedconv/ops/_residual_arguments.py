"""The arguments and results of `gated_residual`, bundled."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gatedconv.ops._gate_arguments import GateOptions, GateOutput, GateParameters, GateStatistics

__all__ = ["InnerGate", "NormArguments", "ResidualOutput"]


class NormArguments(NamedTuple):
    """A BatchNorm over (N, H, W) that uses the batch's statistics.

    weight (C,), bias (C,); mean (C,), var (C,) and batches int64 () move in place by ``momentum``.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    batches: Tensor
    eps: float = 1e-5
    momentum: float = 0.1


class InnerGate(NamedTuple):
    """The arguments of a channel gate that reads what it gates, pooled; see `gatedconv.ops.gate`."""

    parameters: GateParameters
    statistics: GateStatistics
    options: GateOptions
    noise: Tensor | None = None


class ResidualOutput(NamedTuple):
    """What leaves a block.

    out (N, C, H, W); pooled (N, C), its mean over H and W in the norm's dtype, for the next block's gate;
    channel: the inner gate's decision, None without one. All differentiable, but ``channel.gate`` by kernels.
    """

    out: Tensor
    pooled: Tensor
    channel: GateOutput | None
