"""Losses of the joined open rates with gradients in closed form: a few operations a step, however many gates.

Constants are computed once per model and device: a step then copies nothing to the device, does not synchronize, and
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Multilinear", "cached", "gate_average", "multilinear", "polarization"]

Factor = tuple[str, tuple[int, ...] | None]  # a gate, and the channels whose mean counts; None for all
Value = TypeVar("Value")

_constants: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()


def cached(model: nn.Module, key: Hashable, make: Callable[[], Value]) -> Value:
    """The constant of a model under a key, made on first use. It must not refer to the model, or neither is freed."""
    known: dict[Hashable, Any] = _constants.setdefault(model, {})
    if key not in known:
        known[key] = make()
    value: Value = known[key]
    return value


def gate_average(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Weights (sum of sizes,) that make a mean over gates of means over channels out of joined rates."""
    return torch.cat([like.new_full((size,), 1 / (len(sizes) * size)) for size in sizes])


def polarization(rates: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weights * (1 - rates) * rates, both (G,); its gradient is weights * (1 - 2 rates)."""
    loss: Tensor = _Polarization.apply(rates, weights)
    return loss


class _Polarization(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rates: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rates, weights)
        return torch.dot(weights, torch.addcmul(rates, rates, rates, value=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rates, weights = ctx.saved_tensors
        return grad * torch.addcmul(weights, weights, rates, value=-2), None


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
        cls,
        amounts: Sequence[float],
        factors: Sequence[Sequence[Factor]],
        sizes: Mapping[str, int],
        like: Tensor,
    ) -> Multilinear:
        """Constants in the dtype and on the device of ``like``; terms of the same factors become one."""
        merged: dict[tuple[Factor, ...], float] = {}
        for amount, term in zip(amounts, factors, strict=True):
            merged[tuple(term)] = merged.get(tuple(term), 0.0) + amount
        means = {factor: k for k, factor in enumerate(dict.fromkeys(f for term in merged for f in term), start=1)}
        starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))  # and the total
        average = torch.zeros(len(means) + 1, sum(sizes.values()), dtype=torch.float64)
        for (gate, channels), k in means.items():
            columns = range(sizes[gate]) if channels is None else channels
            for column in columns:
                average[k, starts[gate] + column] += 1 / len(columns)
        width = max(1, *(len(term) for term in merged))
        index = torch.tensor([[means[f] for f in term] + [0] * (width - len(term)) for term in merged]).t()
        pick = torch.nn.functional.one_hot(index, len(means) + 1).transpose(1, 2)
        offset = torch.zeros(len(means) + 1)
        offset[0] = 1
        totals = torch.tensor(list(merged.values()), dtype=torch.float64)
        return cls(
            totals.to(like),
            average.to(like),
            offset.to(like),
            index.contiguous().to(like.device),
            pick.to(like),
        )


def multilinear(rates: Tensor, form: Multilinear) -> Tensor:
    """The form at joined rates (G,): a scalar."""
    value: Tensor = _MultilinearForm.apply(rates, form)
    return value


class _MultilinearForm(torch.autograd.Function):
    # PyTorch's gradient of a product synchronizes to look for zeros, and that of indexing sorts.
    @staticmethod
    def forward(ctx: Any, rates: Tensor, form: Multilinear) -> Tensor:
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
