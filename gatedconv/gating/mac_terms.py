"""MACs and parameters of a model as a function of its gates' open rates.

MACs are counted by fvcore's rules: a convolution or linear layer by its multiply-accumulates, a BatchNorm in eval by 2
per element, adaptive pooling by 1 per input element, ReLU and additions by nothing. Their expectation is a multilinear
form of the open rates with its gradient in closed form: a few operations a step, however many gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatedconv.gating.gates import Gate
from gatedconv.gating.registry import open_rates, unwrap

Factor = tuple[str, tuple[int, ...] | None]  # a gate, and the channels whose mean counts; None for all
Value = TypeVar("Value")

_constants: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()


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
        parts = (name for name, part in unwrap(model).named_modules() if vars(part).get("mac_terms"))
        part = next(parts, "")
        raise ValueError(
            f"{owner}: the MACs of {type(unwrap(model)).__name__} are unknown; "
            + (f"its part {part!r} carries them: pass that" if part else "gatedconv.attach_macs counts them")
        )
    return terms


def dense_macs(outputs: Sequence[int], weight: Sequence[int]) -> int:
    """MACs of a convolution or linear layer: each of its outputs sums as many products as an output has weights.

    Args:
        outputs: shape of the result; of a transposed convolution that of its input, as its weight begins with C_in.
        weight: shape of the weight, (C_out, C_in / groups, ...).
    """
    return math.prod(outputs) * math.prod(weight[1:])


def norm_operations(norm: nn.Module) -> int:
    """Operations per element of a norm in eval: 2 with statistics of training, else 5, one less without a weight."""
    affine = getattr(norm, "weight", None) is not None
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
        return 2 if affine else 1
    return 5 if affine else 4


def conv_macs(conv: nn.Module, pixels: int) -> float:
    """MACs of a convolution, or of a linear layer with ``pixels`` 1, that makes ``pixels`` outputs per channel."""
    weight = conv.weight
    assert isinstance(weight, Tensor)
    return float(dense_macs((len(weight), pixels), weight.shape))


def norm_macs(norm: nn.Module, pixels: int) -> float:
    """MACs of a BatchNorm in eval on maps of ``pixels`` elements per channel."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return float(norm_operations(norm) * norm.num_features * pixels)


def params_of(*modules: nn.Module) -> int:
    """Number of parameters of modules, without those of gates inside them."""
    gates = {
        id(p) for module in modules for part in module.modules() if isinstance(part, Gate) for p in part.parameters()
    }
    return sum(p.numel() for module in modules for p in module.parameters() if id(p) not in gates)


def expected_macs(model: nn.Module, rates: Mapping[str, Tensor] | None = None) -> Tensor:
    """MACs per image at the given open rates (default: those of the last batch), a differentiable scalar.

    sum over terms of macs * prod over its gates of mean(open rate): exact when every gate is polarized,
    and on average when a layer gate and the channel gates inside it are independent. Of a model by ``gate_model``,
    ``conversion.estimated`` names the modules for which it is an estimate. Closing all channels of a gate also removes
    the layers that feed only that gate; this saving is not counted.

    Args:
        model: a gated model.
        rates: gate path -> (num_gates,), 0 to 1, of every gate.

    Raises:
        ValueError: the MACs of the model are unknown, a gate has no rate, or has seen no batch.
    """
    terms = mac_terms(model, "expected_macs")
    return _expected("expected_macs", terms, [term.macs for term in terms], model, rates)


def pruning_rate(model: nn.Module, rates: Mapping[str, Tensor] | None = None) -> Tensor:
    """Eq. 11: expected share (0 to 1) of the model's parameters, gates aside, whose gate is closed; a scalar.

    Arguments and errors are those of `expected_macs`.
    """
    terms = mac_terms(model, "pruning_rate")
    total = sum(term.params for term in terms)
    return 1 - _expected("pruning_rate", terms, [float(term.params) for term in terms], model, rates) / total


def _expected(
    owner: str, terms: Sequence[MacTerm], amounts: list[float], model: nn.Module, rates: Mapping[str, Tensor] | None
) -> Tensor:
    rates = open_rates(model, owner) if rates is None else rates
    missing = {gate for term in terms for gate in term.gates} - rates.keys()
    if missing:
        raise ValueError(f"{owner}: no open rate for the gates {sorted(missing)}")
    joined = torch.cat(list(rates.values())) if rates else torch.zeros(0, device="cpu")
    sizes = {name: rate.numel() for name, rate in rates.items()}
    key = ("expected", tuple(amounts), tuple(sizes.items()), joined.device, joined.dtype)
    form = cached(unwrap(model), key, lambda: Multilinear.build(amounts, [_factors(t) for t in terms], sizes, joined))
    return multilinear(joined, form)


def _factors(term: MacTerm) -> list[Factor]:
    return list(zip(term.gates, term.channels or [None] * len(term.gates), strict=True))


def cached(model: nn.Module, key: Hashable, make: Callable[[], Value]) -> Value:
    """The constant of a model under a key, made on first use. It must not refer to the model, or neither is freed.

    With constants that are computed once per model and device a step copies nothing to the device, does not
    synchronize, and can be captured in a CUDA graph.
    """
    known: dict[Hashable, Any] = _constants.setdefault(model, {})
    if key not in known:
        known[key] = make()
    value: Value = known[key]
    return value


class Multilinear(NamedTuple):
    """The sum over terms of amount * product over factors of a mean of rates.

    amounts (T,); average (K, G), row k the weights of mean k; offset (K,), 1 for mean 0, which is always 1
    and fills up terms of fewer factors; columns int64 (W, T), the means of each term; pick (W, K, T), the
    same as ones and zeros.
    """

    amounts: Tensor
    average: Tensor
    offset: Tensor
    columns: Tensor
    pick: Tensor

    @classmethod
    def build(
        cls, amounts: Sequence[float], factors: Sequence[Sequence[Factor]], sizes: Mapping[str, int], like: Tensor
    ) -> Multilinear:
        """Constants in the dtype and on the device of ``like``; terms of the same factors become one."""
        merged: dict[tuple[Factor, ...], float] = {}
        for amount, term in zip(amounts, factors, strict=True):
            merged[tuple(term)] = merged.get(tuple(term), 0.0) + amount
        means = {factor: k for k, factor in enumerate(dict.fromkeys(f for term in merged for f in term), start=1)}
        starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))  # and the total
        average = torch.zeros(len(means) + 1, sum(sizes.values()), dtype=torch.float64, device="cpu")
        for (gate, channels), k in means.items():
            columns = range(sizes[gate]) if channels is None else channels
            for column in columns:
                average[k, starts[gate] + column] += 1 / len(columns)
        width = max(1, *(len(term) for term in merged))
        index = torch.tensor(
            [[means[f] for f in term] + [0] * (width - len(term)) for term in merged], device="cpu"
        ).t()
        pick = torch.nn.functional.one_hot(index, len(means) + 1).transpose(1, 2)
        offset = torch.zeros(len(means) + 1, device="cpu")
        offset[0] = 1
        totals = torch.tensor(list(merged.values()), dtype=torch.float64, device="cpu")
        return cls(
            totals.to(like), average.to(like), offset.to(like), index.contiguous().to(like.device), pick.to(like)
        )


def multilinear(rates: Tensor, form: Multilinear) -> Tensor:
    """The form at joined rates (G,): a scalar."""
    value: Tensor = _MultilinearForm.apply(rates, form)
    return value


class _MultilinearForm(torch.autograd.Function):
    # PyTorch's gradient of a product synchronizes to look for zeros, and that of indexing sorts.
    @staticmethod
    def forward(ctx: Any, rates: Tensor, form: Multilinear) -> Tensor:
        with torch.autocast(rates.device.type, enabled=False):  # counts of MACs do not fit into half precision
            means = torch.addmv(form.offset, form.average, rates)
            factors = means[form.columns].unbind()
            slope: Tensor | None = None
            for w, pick in enumerate(form.pick):
                others = form.amounts
                for other in (*factors[:w], *factors[w + 1 :]):
                    others = others * other
                slope = pick @ others if slope is None else torch.addmv(slope, pick, others)
            assert slope is not None
            ctx.save_for_backward(slope @ form.average)
            value = form.amounts
            for factor in factors[:-1]:
                value = value * factor
            return torch.dot(value, factors[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None
