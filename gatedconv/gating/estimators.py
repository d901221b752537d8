"""Gradient estimators: from real logits to binary gates through which gradients still flow.

The arithmetic is `gatedconv.ops.estimate`; here is what an estimator keeps between calls. In training it may
draw noise; in eval every one of them is deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedconv.ops import ESTIMATORS

RUNNING_MOMENTUM = 0.1  # as BatchNorm's running statistics: about the last ten batches

__all__ = ["ESTIMATORS", "RUNNING_MOMENTUM", "Estimator", "make_estimator"]


class Estimator(nn.Module):
    r"""What `gatedconv.ops.estimate` takes besides logits (N, num_gates), and their distance from the threshold.

    "ste": eqs. 3-4 of the paper: forward z > 0; backward the identity where \|z\| <= 1. "gumbel": hard
    binary Gumbel-softmax (Jang et al. 2017). "bernoulli": a sample of Bernoulli(sigmoid(z)) with the gradient
    of the probability (Bengio et al. 2013). "batch_mean": the paper's "Bernoulli" ablation, open above the
    batch mean of the logits (section 4.4); in eval above the running mean of the training batches, so that a
    prediction depends on its own image alone.

    Attributes:
        running_mean: buffer (num_gates,) of "batch_mean"; None for the others.
    """

    running_mean: Tensor | None

    def __init__(self, name: str, num_gates: int, temperature: float) -> None:
        super().__init__()
        self.name = name
        self.temperature = temperature
        self.register_buffer("running_mean", torch.zeros(num_gates) if name == "batch_mean" else None)

    def draw_noise(self, batch: int, num_gates: int, like: Tensor) -> Tensor | None:
        """Uniform noise (batch, num_gates) of this call, in the dtype of ``like``; None if none is needed."""
        if not self.training or self.name not in ("gumbel", "bernoulli"):
            return None
        return torch.rand(batch, num_gates, dtype=like.dtype, device=like.device)

    def margin(self, logits: Tensor) -> Tensor:
        """Signed distance (N, num_gates) from the threshold, of which eq. 4 lets gradients through up to 1.

        0 for estimators without such a window: their gradient never vanishes.
        """
        if self.running_mean is not None:
            threshold = logits.mean(dim=0) if self.training else self.running_mean
            return logits - threshold
        return logits if self.name == "ste" else torch.zeros_like(logits)


def make_estimator(name: str, num_gates: int, temperature: float, *, owner: str) -> Estimator:
    """Estimator by name; ValueError, naming ``owner``, for an unknown one or a temperature <= 0."""
    if name not in ESTIMATORS:
        raise ValueError(f"{owner}: estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    if not temperature > 0:
        raise ValueError(f"{owner}: temperature must be above 0, got {temperature!r}")
    return Estimator(name, num_gates, float(temperature))
