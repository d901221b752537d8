"""Gradient estimators: from real logits to binary gates through which gradients still flow."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedconv._checks import require_choice, require_tensor
from gatedconv.ops.ste import ste

ESTIMATORS = ("ste", "gumbel", "bernoulli", "batch_mean")
DEFAULT_TEMPERATURE = 2 / 3  # at most 1 for two classes: above, hard samples and soft gradients disagree


def estimate(
    logits: Tensor,
    estimator: str,
    *,
    noise: Tensor | None = None,
    temperature: float = DEFAULT_TEMPERATURE,
    threshold: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
) -> Tensor:
    """Gates of ``logits`` (N, num_gates): exactly 0 or 1, in the dtype of the logits.

    Args:
        logits: floating point (N, num_gates).
        estimator: "ste", eqs. 3-4 of the paper; "gumbel", the hard binary Gumbel-softmax (Jang et al. 2017);
            "bernoulli", a sample of Bernoulli(sigmoid(z)) with the gradient of its probability (Bengio et al.
            2013); "batch_mean", the paper's section 4.4: open above the batch mean of the logits, backward as
            in eq. 4.
        noise: uniform on [0, 1), shape and dtype of ``logits``; None makes "gumbel" and "bernoulli"
            deterministic: open where z > 0. The others use none.
        temperature: of the Gumbel-softmax, above 0.
        threshold: (num_gates,), of "batch_mean" alone: the running batch mean, which replaces the
            batch's own where not ``training`` and moves by ``momentum``, in place, where training.
        training: of "batch_mean" alone.
        momentum: of ``threshold``.

    Raises:
        TypeError: logits or noise that are not floating point.
        ValueError: noise of another shape or device, an unknown estimator, or a temperature that is not above 0.
    """
    require_tensor("estimate", "logits", logits)
    if noise is not None:
        require_tensor("estimate", "noise", noise, logits.shape, logits.device)
    require_estimator("estimate", estimator, temperature)
    if estimator == "ste":
        return ste(logits)
    if estimator == "batch_mean":
        return ste(logits - _batch_mean(logits, threshold, training, momentum))
    if estimator == "bernoulli":
        probability = torch.sigmoid(logits)
        return _hard_forward(logits > 0 if noise is None else noise < probability, probability)
    noisy = logits if noise is None else logits + logistic_noise(noise)
    return _hard_forward(noisy > 0, torch.sigmoid(noisy / temperature))


def require_estimator(owner: str, name: str, temperature: float) -> None:
    """ValueError unless there is such an estimator, and the temperature is above 0."""
    require_choice(owner, "estimator", name, ESTIMATORS)
    if not temperature > 0:
        raise ValueError(f"{owner}: temperature must be above 0, got {temperature!r}")


def logistic_noise(uniform: Tensor) -> Tensor:
    """The difference of two Gumbel variables is logistic: log(u / (1 - u)).

    u = 0 or 1 would be an infinite logit, whose gradient is NaN, so u is kept off both ends.
    """
    limits = torch.finfo(uniform.dtype)
    uniform = uniform.clamp(limits.tiny, 1 - limits.eps)
    return torch.log(uniform) - torch.log1p(-uniform)


def _batch_mean(logits: Tensor, running: Tensor | None, training: bool, momentum: float) -> Tensor:
    if not training:
        return logits.new_zeros(()) if running is None else running.to(logits.dtype)
    if not len(logits):
        return logits.new_zeros(logits.shape[1:])
    mean = logits.mean(dim=0)
    if running is not None:
        with torch.no_grad():
            running.lerp_(mean.detach().to(running.dtype), momentum)
    return mean


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
