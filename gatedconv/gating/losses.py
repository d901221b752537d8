"""The regularizers of the method: each a differentiable scalar made of the gates' open rates.

With more than one process they are functions of the global batch: the open rates are averaged over all
ranks, the gradient included, before anything nonlinear happens to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatedconv._checks import require_choice
from gatedconv.gating.collectives import global_mean, world_size
from gatedconv.gating.gates import LearnedGate
from gatedconv.gating.mac_terms import cached, expected_macs, mac_terms
from gatedconv.gating.registry import find_gates, open_rates, require_gates, unwrap

_WINDOW = "gatedconv_rate_window"  # the attribute of a model in `accumulating`


def polarization_loss(model: nn.Module) -> Tensor:
    """Eqs. 6-8: mean over gates of mean over channels of (1 - g) * g, g the batch's open rate.

    0 when every sample agrees on every gate, at most 1/4. Scalar, dtype of the gates.

    Args:
        model: a gated model, or DistributedDataParallel around one, after a forward of a training step.

    Raises:
        ValueError: the model has no gates, or one of them has seen no batch.
    """
    rates = global_open_rates(model, "polarization_loss")
    joined = torch.cat(list(rates.values()))
    loss: Tensor = _Polarization.apply(joined, _gate_weights(model, rates, joined))
    return loss


class _Polarization(torch.autograd.Function):
    """The sum of weights * (1 - rates) * rates, both (G,); its gradient is weights * (1 - 2 rates)."""

    @staticmethod
    def forward(ctx: Any, rates: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rates, weights)
        return torch.dot(weights, torch.addcmul(rates, rates, rates, value=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rates, weights = ctx.saved_tensors
        return grad * torch.addcmul(weights, weights, rates, value=-2), None


def activation_loss(model: nn.Module, weight: str = "uniform") -> Tensor:
    """Eq. 10: the mean open rate over gates, 0 to 1.

    Args:
        model: a gated model that has seen a batch.
        weight: "uniform" weighs each gate equally (the paper); "macs" by the MACs that it controls.

    Raises:
        ValueError: another weight, or a model without gates or without a batch.
    """
    require_choice("activation_loss", "weight", weight, ("uniform", "macs"))
    rates = global_open_rates(model, "activation_loss")
    joined = torch.cat(list(rates.values()))
    if weight == "uniform":
        return torch.dot(joined, _gate_weights(model, rates, joined))
    return torch.dot(joined, _mac_weights(model, rates, joined))


def mac_target_loss(model: nn.Module, target: float = 0.5) -> Tensor:
    """(MACs / target MACs - 1)^2: pulls towards ``target`` times the dense model's MACs, 0 < target <= 1.

    Polarization is minimal with all gates open and with all closed; this loss sets how many are open. A scalar.

    Args:
        model: as of `polarization_loss`.
        target: share of the dense model's MACs.

    Raises:
        ValueError: another target; the model has no gates, one of them has seen no batch, or its MACs are unknown.
    """
    if not 0 < target <= 1:
        raise ValueError(f"mac_target_loss: target must be in (0, 1], got {target!r}")
    total = sum(term.macs for term in mac_terms(model, "mac_target_loss"))
    expected = expected_macs(model, global_open_rates(model, "mac_target_loss"))
    return (expected / (target * total) - 1) ** 2


class MacController(nn.Module):
    """Integral controller: the price of MACs rises while the model is above its target, and falls while it is below.

    A fixed weight of ``mac_target_loss`` balances the pull of the task at some distance from the target; a price that
    changes until the distance is 0 reaches it.

    Args:
        gain: change of the price in one step for MACs that are off by the dense network's, above 0.

    Attributes:
        price: buffer (), of the dense network's MACs in units of the loss. Part of the state dict.
    """

    price: Tensor

    def __init__(self, gain: float) -> None:
        super().__init__()
        if not gain > 0:
            raise ValueError(f"MacController: gain must be above 0, got {gain!r}")
        self.gain = gain
        self.register_buffer("price", torch.zeros(()))

    def forward(self, model: nn.Module, target: float | Tensor) -> Tensor:
        """The loss of one step, a scalar: price * (MACs / dense MACs), the price moved just before.

        Args:
            model: a gated model that has seen a batch.
            target: MACs to reach now, as a share of the dense model's, in (0, 1]; a scalar tensor is not checked.
        """
        if not isinstance(target, Tensor) and not 0 < target <= 1:  # reading a tensor may synchronize
            raise ValueError(f"MacController: target must be in (0, 1], got {target!r}")
        total = sum(term.macs for term in mac_terms(model, "MacController"))
        share = expected_macs(model, global_open_rates(model, "MacController")) / total
        with torch.no_grad():
            self.price += self.gain * (share - target)
        return self.price.clone() * share


def _gate_weights(model: nn.Module, rates: dict[str, Tensor], like: Tensor) -> Tensor:
    """Weights of the joined rates that give every gate the same share."""
    return _weights(model, tuple((1 / (len(rates) * rate.numel()), rate.numel()) for rate in rates.values()), like)


def _mac_weights(model: nn.Module, rates: dict[str, Tensor], like: Tensor) -> Tensor:
    """Weights of the joined rates by the MACs that each gate controls."""
    controlled = dict.fromkeys(rates, 0.0)
    for term in mac_terms(model, "activation_loss"):
        for gate in term.gates:
            controlled[gate] += term.macs
    total = sum(controlled.values())
    sizes = {name: rate.numel() for name, rate in rates.items()}
    return _weights(model, tuple((macs / total / sizes[gate], sizes[gate]) for gate, macs in controlled.items()), like)


def _weights(model: nn.Module, shares: tuple[tuple[float, int], ...], like: Tensor) -> Tensor:
    """The shares, each repeated ``size`` times, as one vector."""
    return cached(
        unwrap(model),
        ("weights", shares, like.device, like.dtype),
        lambda: torch.cat([like.new_full((size,), share) for share, size in shares]),
    )


def global_open_rates(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """Open rates of the last batch averaged over the samples of all ranks, differentiable.

    One collective per step serves all gates and losses. In eval there is none, since an evaluation may run on a
    single rank. Under `accumulating` the rates are those of all parts of a step.
    """
    rates = open_rates(model, owner)
    if torch.is_grad_enabled() and not all(rate.requires_grad for rate in rates.values()):
        _warn_of_constants(model, rates, owner)
    window: RateWindow | None = vars(unwrap(model)).get(_WINDOW)
    if not model.training or (world_size() == 1 and window is None):
        return rates
    if torch.compiler.is_compiling():
        return _joined(model, rates, window)
    gates = find_gates(model)
    known = {name: gate.global_open_rate for name, gate in gates.items()}
    # The same tensors are of the same batch: several losses share one collective.
    if any(pair is None or pair[0] is not rates[name] for name, pair in known.items()):
        for name, mean in _joined(model, rates, window).items():
            known[name] = gates[name].global_open_rate = (rates[name], mean)
    return {name: pair[1] for name, pair in known.items() if pair is not None}


def _warn_of_constants(model: nn.Module, rates: dict[str, Tensor], owner: str) -> None:
    """Warn of gates that would learn if their last forward in training had not been one without gradients."""
    learned = {n: gate for n, gate in find_gates(model).items() if isinstance(gate, LearnedGate) and gate.training}
    cut = [n for n, g in learned.items() if not rates[n].requires_grad and any(p.requires_grad for p in g.parameters())]
    if cut:
        warnings.warn(
            f"{owner}: {len(cut)} of {len(rates)} gates ran without gradients (the first is {cut[0]!r}), under "
            f"torch.no_grad or in a checkpoint with use_reentrant=True; this loss does not train them",
            stacklevel=4,
        )


def _joined(model: nn.Module, rates: dict[str, Tensor], window: RateWindow | None) -> dict[str, Tensor]:
    joined = torch.cat(list(rates.values()))
    if world_size() > 1:
        joined = global_mean(joined, _batch_size(model))
    if window is not None:
        joined = window.mix(joined)
    return dict(zip(rates, joined.split([rate.numel() for rate in rates.values()]), strict=True))


def _batch_size(model: nn.Module) -> int:
    """Samples of the last batch on this rank, or rows of several calls: in training a layer gate sees all of them."""
    logits = (gate.logits for gate in find_gates(model).values())
    return next((found.shape[0] for found in logits if found is not None), 1)


class RateWindow(nn.Module):
    """The open rates of the last ``parts`` batches of a model, of which only the current one has a gradient.

    They are buffers: a checkpoint holds them, and undoing a step restores them with the rest.

    Args:
        model: a gated model, already on its device.
        parts: batches that count, at least 2.

    Attributes:
        before: buffer (parts - 1, G), the joined rates of the batches before, the oldest first, zeros where there
            was none yet.
        seen: buffer (), how many of them are filled.
    """

    before: Tensor
    seen: Tensor

    def __init__(self, model: nn.Module, parts: int) -> None:
        super().__init__()
        if parts < 2:
            raise ValueError(f"RateWindow: parts must be at least 2, got {parts}")
        like = torch.cat([gate.running_open_rate for gate in require_gates(model, "RateWindow").values()])
        self.parts = parts
        self.register_buffer("before", like.new_zeros(parts - 1, like.numel()))
        self.register_buffer("seen", like.new_zeros(()))

    def mix(self, joined: Tensor) -> Tensor:
        """Add the joined rates (G,) of a batch; returns their mean with those before, the gradient 1 / parts."""
        now = joined.detach()
        with torch.no_grad():
            mean = (self.before.sum(dim=0) + now) / (self.seen + 1)
            self.before.copy_(torch.cat([self.before[1:], now[None]]))
            self.seen.add_(1).clamp_(max=len(self.before))
        return mean + (joined - now) / self.parts


@contextmanager
def accumulating(model: nn.Module, window: RateWindow | None) -> Iterator[None]:
    """Context in which the losses see open rates averaged over the last training batches, by ``window``.

    For gradient accumulation: a step made of several batches. The value of a loss is that at the average;
    its gradient goes through the current batch alone, with the weight 1 / parts that it has there, so that
    the gradients of the parts add up to that of the step. None changes nothing.
    """
    if window is not None:
        vars(unwrap(model))[_WINDOW] = window  # not a submodule: it is the trainer's
    try:
        yield
    finally:
        vars(unwrap(model)).pop(_WINDOW, None)
        for gate in find_gates(model).values():
            gate.global_open_rate = None
