"""Gradient estimators: from real logits to binary gates through which gradients still flow.

Each estimator is a small module ``logits (N, num_gates) -> gate (N, num_gates)``, the gate exactly 0 or
1 in the logits' dtype. In training it may draw noise; in eval every one of them is deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedconv import ops

ESTIMATORS = ("ste", "gumbel", "bernoulli", "batch_mean")


class Estimator(nn.Module):
    """Base class; see the module's docstring for the contract."""

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (N, num_gates) -> gate (N, num_gates) in {0, 1}."""
        raise NotImplementedError


class StraightThrough(Estimator):
    """Eqs. 3-4 of the paper: forward z > 0; backward the identity where abs(z) <= 1."""

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (N, num_gates) -> gate (N, num_gates) in {0, 1}."""
        return ops.ste(logits)


class GumbelSoftmax(Estimator):
    """Hard binary Gumbel-softmax (Jang et al. 2017) with straight-through gradient.

    The two-class case: the difference of two Gumbel variables is logistic, so with u uniform on (0, 1)
    s = sigmoid((z + log u - log(1 - u)) / temperature); forward s > 1/2, backward ds/dz. No noise in eval.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (N, num_gates) -> gate (N, num_gates) in {0, 1}."""
        noisy = logits
        if self.training:
            # Open interval: u = 0 or 1 would be an infinite logit, whose gradient is NaN.
            tiny = torch.finfo(logits.dtype).tiny
            u = torch.rand_like(logits).clamp(tiny, 1 - torch.finfo(logits.dtype).eps)
            noisy = logits + torch.log(u) - torch.log1p(-u)
        return _hard_forward(noisy > 0, torch.sigmoid(noisy / self.temperature))


class Bernoulli(Estimator):
    """A sample of Bernoulli(sigmoid(z)), straight-through: the gradient is that of the probability.

    In eval the more likely value, z > 0 (Bengio et al. 2013).
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (N, num_gates) -> gate (N, num_gates) in {0, 1}."""
        probability = torch.sigmoid(logits)
        decision = torch.rand_like(probability) < probability if self.training else logits > 0
        return _hard_forward(decision, probability)


class BatchMean(Estimator):
    """The paper's "Bernoulli" ablation: open where the logit is above its batch mean (section 4.4).

    Deterministic, but dependent on the other images of the batch; in eval the running mean of the
    training batches stands in, so that a prediction depends on its own image alone. Backward as in eq. 4.
    """

    running_mean: Tensor

    def __init__(self, num_gates: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_gates))

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (N, num_gates) -> gate (N, num_gates) in {0, 1}."""
        if not self.training:
            return ops.ste(logits - self.running_mean.to(logits.dtype))
        mean = logits.mean(dim=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), 0.1)
        return ops.ste(logits - mean)


def make_estimator(name: str, num_gates: int, temperature: float, *, owner: str) -> Estimator:
    """Estimator by name; ValueError, naming ``owner``, for an unknown one or a temperature <= 0."""
    if name not in ESTIMATORS:
        raise ValueError(f"{owner}: estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    if not temperature > 0:
        raise ValueError(f"{owner}: temperature must be above 0, got {temperature!r}")
    if name == "gumbel":
        return GumbelSoftmax(float(temperature))
    if name == "batch_mean":
        return BatchMean(num_gates)
    return StraightThrough() if name == "ste" else Bernoulli()


def _hard_forward(decision: Tensor, soft: Tensor) -> Tensor:
    """The decision's value with the soft probability's gradient.

    ``hard - soft.detach() + soft`` would leave values like 0.9999999; the gate has to be exactly 0 or 1.
    """
    hard: Tensor = _HardForward.apply(decision, soft)
    return hard


class _HardForward(torch.autograd.Function):
    @staticmethod
    def forward(decision: Tensor, soft: Tensor) -> Tensor:
        return decision.to(soft.dtype)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
