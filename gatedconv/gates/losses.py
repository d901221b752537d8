"""The regularisers of the method: each a differentiable scalar made of the gates' open rates.

With more than one process they are functions of the global batch: the open rates are averaged over all
ranks, the gradient included, before anything nonlinear happens to them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatedconv.gates.closed_form import cached, gate_average, polarization
from gatedconv.gates.costs import expected_macs, mac_terms
from gatedconv.gates.registry import open_rates, unwrap


def polarization_loss(model: nn.Module) -> Tensor:
    """Eqs. 6-8: mean over gates of mean over channels of (1 - g) * g, g the batch's open rate.

    0 when every sample agrees on every gate, at most 1/4. Scalar, dtype of the gates.
    """
    rates = global_open_rates(model, "polarization_loss")
    joined = torch.cat(list(rates.values()))
    return polarization(joined, _gate_weights(model, rates, joined))


def activation_loss(model: nn.Module, weight: str = "uniform") -> Tensor:
    """Eq. 10: the mean open rate over gates, 0 to 1.

    Args:
        model: a gated model that has seen a batch.
        weight: "uniform" weighs each gate alike (the paper); "macs" by the MACs that it controls.
    """
    if weight not in ("uniform", "macs"):
        raise ValueError(f"activation_loss: weight must be 'uniform' or 'macs', got {weight!r}")
    rates = global_open_rates(model, "activation_loss")
    joined = torch.cat(list(rates.values()))
    if weight == "uniform":
        return torch.dot(joined, _gate_weights(model, rates, joined))
    return torch.dot(joined, _mac_weights(model, rates, joined))


def mac_target_loss(model: nn.Module, target: float = 0.5) -> Tensor:
    """(MACs / target MACs - 1)^2: the pull towards ``target`` times the dense model's MACs, 0 < target <= 1.

    Polarization alone is content with everything open, and with everything closed; this is what chooses.
    """
    if not 0 < target <= 1:
        raise ValueError(f"mac_target_loss: target must be in (0, 1], got {target!r}")
    total = sum(term.macs for term in mac_terms(model, "mac_target_loss"))
    expected = expected_macs(model, global_open_rates(model, "mac_target_loss"))
    return (expected / (target * total) - 1) ** 2


def _gate_weights(model: nn.Module, rates: dict[str, Tensor], like: Tensor) -> Tensor:
    """Weights of the joined rates that give every gate the same say."""
    sizes = tuple(rate.numel() for rate in rates.values())
    return cached(
        unwrap(model), ("gates", sizes, like.device, like.dtype), lambda: gate_average(sizes, like.detach())
    )


def _mac_weights(model: nn.Module, rates: dict[str, Tensor], like: Tensor) -> Tensor:
    """Weights of the joined rates by the MACs that each gate controls."""
    controlled = dict.fromkeys(rates, 0.0)
    for term in mac_terms(model, "activation_loss"):
        for gate in term.gates:
            controlled[gate] += term.macs
    total = sum(controlled.values())
    shares = tuple(
        (macs / total / rates[gate].numel(), rates[gate].numel()) for gate, macs in controlled.items()
    )
    return cached(
        unwrap(model),
        ("macs", shares, like.device, like.dtype),
        lambda: torch.cat([like.new_full((size,), share) for share, size in shares]),
    )


def global_open_rates(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """Open rates of the last batch averaged over all ranks (equal batches per rank), differentiable.

    One collective for all gates, and only in training: an evaluation may run on a single rank.
    """
    rates = open_rates(model, owner)
    if not (model.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rates
    joined: Tensor = _RankMean.apply(torch.cat(list(rates.values())))
    return dict(zip(rates, joined.split([rate.numel() for rate in rates.values()]), strict=True))


class _RankMean(torch.autograd.Function):
    """The mean over all ranks; each of them holds a copy of the loss, so each gets the mean gradient."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()
