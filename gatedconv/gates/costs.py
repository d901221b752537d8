"""What gates cost and save: MACs and parameters of a model as a function of its open rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatedconv.gates.registry import open_rates, unwrap


@dataclass(frozen=True)
class MacTerm:
    """A piece of work that runs in proportion to the mean open rate of each gate named.

    Attributes:
        macs: multiply-accumulates per image when everything is open, by fvcore's rules
            (a BatchNorm counts 2 per element, a pool 1).
        params: parameters that belong to it.
        gates: paths of the gates that scale it; empty for work that always runs.
    """

    macs: float
    params: int = 0
    gates: tuple[str, ...] = ()


def mac_terms(model: nn.Module, owner: str) -> Sequence[MacTerm]:
    """The model's terms; ValueError, naming ``owner``, for a model that carries none."""
    terms: Sequence[MacTerm] | None = getattr(unwrap(model), "mac_terms", None)
    if not terms:
        raise ValueError(
            f"{owner}: the MACs of {type(unwrap(model)).__name__} are unknown; models of gatedconv.models "
            "and gatedconv.gate_model carry them"
        )
    return terms


def expected_macs(model: nn.Module, rates: Mapping[str, Tensor] | None = None) -> Tensor:
    """MACs per image at the given open rates (default: those of the last batch), a differentiable scalar.

    sum over terms of macs * prod over its gates of mean(open rate): exact when every gate is polarised,
    and on average when a layer gate and the channel gates inside it are independent.
    """
    terms = mac_terms(model, "expected_macs")
    return _expected(terms, [term.macs for term in terms], model, rates)


def pruning_rate(model: nn.Module, rates: Mapping[str, Tensor] | None = None) -> Tensor:
    """Eq. 11: expected share (0 to 1) of the model's parameters, gates aside, whose gate is closed."""
    terms = mac_terms(model, "pruning_rate")
    total = sum(term.params for term in terms)
    return 1 - _expected(terms, [float(term.params) for term in terms], model, rates) / total


def _expected(
    terms: Sequence[MacTerm], amounts: list[float], model: nn.Module, rates: Mapping[str, Tensor] | None
) -> Tensor:
    rates = open_rates(model, "expected_macs") if rates is None else rates
    means = {name: rate.mean() for name, rate in rates.items()}
    missing = {gate for term in terms for gate in term.gates} - means.keys()
    if missing:
        raise ValueError(f"expected_macs: no open rate for the gates {sorted(missing)}")
    always = math.fsum(amount for term, amount in zip(terms, amounts, strict=True) if not term.gates)
    anchor = next(iter(means.values()), torch.zeros(()))
    expected = torch.full_like(anchor, always)
    for term, amount in zip(terms, amounts, strict=True):
        if term.gates:
            expected = expected + amount * math.prod(
                (means[g] for g in term.gates[1:]), start=means[term.gates[0]]
            )
    return expected
