"""MACs and parameters of a model as a function of its gates' open rates.

MACs are counted by fvcore's rules: a convolution or linear layer by its multiply-accumulates, a BatchNorm in eval by 2
per element, adaptive pooling by 1 per input element, ReLU and additions by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatedconv.gating.gate import Gate
from gatedconv.gating.multilinear import Multilinear, cached, multilinear
from gatedconv.gating.registry import open_rates, unwrap


@dataclass(frozen=True)
class MacTerm:
    """Work whose amount is proportional to the mean open rate of each of its gates.

    Attributes:
        macs: multiply-accumulates per image with everything open.
        params: number of parameters that do this work.
        gates: paths of the gates that scale it; empty for work that always runs.
        channels: for each gate the channels whose mean counts, None for all; empty for all channels of every gate.
    """

    macs: float
    params: int = 0
    gates: tuple[str, ...] = ()
    channels: tuple[tuple[int, ...] | None, ...] = ()


def mac_terms(model: nn.Module, owner: str) -> Sequence[MacTerm]:
    """The model's terms; ValueError, naming ``owner``, for a model that carries none."""
    terms: Sequence[MacTerm] | None = getattr(unwrap(model), "mac_terms", None)
    if not terms:
        raise ValueError(
            f"{owner}: the MACs of {type(unwrap(model)).__name__} are unknown; models of gatedconv.models "
            "and gatedconv.gate_model carry them"
        )
    return terms


def conv_macs(conv: nn.Module, pixels: int) -> float:
    """MACs of a convolution, or of a linear layer with ``pixels`` 1, that makes ``pixels`` outputs per channel."""
    return float(_weight_count(conv) * pixels)


def norm_macs(norm: nn.Module, pixels: int) -> float:
    """MACs of a BatchNorm in eval on maps of ``pixels`` elements per channel."""
    return float(2 * _weight_count(norm) * pixels)


def params_of(*modules: nn.Module) -> int:
    """Number of parameters of modules, without those of gates inside them."""
    gates = {
        id(p) for module in modules for part in module.modules() if isinstance(part, Gate) for p in part.parameters()
    }
    return sum(p.numel() for module in modules for p in module.parameters() if id(p) not in gates)


def _weight_count(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def expected_macs(model: nn.Module, rates: Mapping[str, Tensor] | None = None) -> Tensor:
    """MACs per image at the given open rates (default: those of the last batch), a differentiable scalar.

    sum over terms of macs * prod over its gates of mean(open rate): exact when every gate is polarized,
    and on average when a layer gate and the channel gates inside it are independent. Of a model by ``gate_model``,
    ``conversion.estimated`` names the modules for which it is an estimate; a gate with no open channel also removes
    what computes for it alone, which is not counted here.
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
    missing = {gate for term in terms for gate in term.gates} - rates.keys()
    if missing:
        raise ValueError(f"expected_macs: no open rate for the gates {sorted(missing)}")
    joined = torch.cat(list(rates.values())) if rates else torch.zeros(0)
    sizes = {name: rate.numel() for name, rate in rates.items()}
    key = ("expected", tuple(amounts), tuple(sizes.items()), joined.device, joined.dtype)
    form = cached(unwrap(model), key, lambda: Multilinear.build(amounts, [_factors(t) for t in terms], sizes, joined))
    return multilinear(joined, form)


def _factors(term: MacTerm) -> list[tuple[str, tuple[int, ...] | None]]:
    return list(zip(term.gates, term.channels or [None] * len(term.gates), strict=True))
