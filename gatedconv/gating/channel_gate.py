"""The gate of single channels."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from gatedconv.gating.gate import LearnedGate
from gatedconv.gating.layer_gate import DEFAULT_TEMPERATURE

POOLS = ("avg", "flatten")


class ChannelGate(LearnedGate):
    """One decision per sample and channel (Table 2 of the paper, right column).

    Args:
        in_channels: C of the input that the gate reads.
        num_gates: number of gated channels; default ``in_channels``.
        hidden: units of the hidden dense layer; None for a single dense layer (the paper's 1FC).
        pool: "avg" (global average pool, any H and W) or "flatten" (the paper's: every position is a
            feature, which fixes H and W and costs C*H*W*hidden parameters).
        feature_size: H*W, or (H, W), of the input; needed by "flatten" alone.
        estimator: "ste", "gumbel", "bernoulli" or "batch_mean".
        temperature: of the Gumbel-softmax; unused by the others.

    Shape: x (N, in_channels, H, W) -> gate (N, num_gates) in {0, 1}, x.dtype.
    """

    def __init__(
        self,
        in_channels: int,
        num_gates: int | None = None,
        *,
        hidden: int | None = 16,
        pool: str = "avg",
        feature_size: int | tuple[int, int] | None = None,
        estimator: str = "ste",
        temperature: float = DEFAULT_TEMPERATURE,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"ChannelGate: pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if pool == "flatten" and feature_size is None:
            raise ValueError("ChannelGate: pool='flatten' needs feature_size, the H*W of the input")
        size = math.prod(feature_size) if isinstance(feature_size, tuple) else feature_size
        if size is not None and size < 1:
            raise ValueError(f"ChannelGate: feature_size must be at least 1, got {feature_size!r}")
        positions = size if pool == "flatten" and size is not None else 1
        super().__init__(
            in_channels * positions,
            in_channels if num_gates is None else num_gates,
            hidden=hidden,
            estimator=estimator,
            temperature=temperature,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.pool = pool
        self.feature_size = size

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is (N, C, H, W) of a size that the gate was built for."""
        super().check_input(x)
        if self.pool == "flatten" and x.shape[2] * x.shape[3] != self.feature_size:
            raise ValueError(
                f"ChannelGate: pool='flatten' was built for H*W = {self.feature_size}, got {tuple(x.shape)}"
            )
