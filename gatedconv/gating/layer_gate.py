"""The gate of a layer or a residual branch."""

from __future__ import annotations

from typing import Any

from gatedconv.gating.gate import LearnedGate

DEFAULT_TEMPERATURE = 2 / 3  # at most 1 for two classes: above, hard samples and soft gradients disagree


class LayerGate(LearnedGate):
    """One decision per sample, whether this layer runs (Table 2 of the paper, left column).

    Global average pool -> dense ``hidden`` -> BatchNorm1d -> ReLU -> dense 1 -> estimator.

    Args:
        in_channels: C of the input.
        hidden: units of the hidden dense layer; None for a single dense layer.
        estimator: "ste", "gumbel", "bernoulli" or "batch_mean".
        temperature: of the Gumbel-softmax; unused by the others.

    Shape: x (N, in_channels, H, W) -> gate (N, 1) in {0, 1}, x.dtype.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        hidden: int | None = 16,
        estimator: str = "ste",
        temperature: float = DEFAULT_TEMPERATURE,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            1,
            hidden=hidden,
            estimator=estimator,
            temperature=temperature,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.pool = "avg"
