"""A consensus of a given size: gates ranked by what closing them would cost, closed until the MACs fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from gatedconv.gating.collectives import sum_over_ranks
from gatedconv.gating.gates import Gate
from gatedconv.gating.mac_terms import expected_macs
from gatedconv.gating.registry import copied, eval_mode, find_gates, require_gates


def masks_for_target(model: nn.Module, scores: Mapping[str, Tensor], target: float) -> dict[str, Tensor]:
    """Close gates in rising order of their scores until the MACs are as near to ``target`` as they can be.

    Args:
        model: a gated model that carries ``mac_terms``.
        scores: per gate path (num_gates,), what closing it would cost; equal scores close in module order.
        target: share of the MACs of the model with everything open, in (0, 1].

    Returns:
        Per gate path a bool mask (num_gates,), True for open. With gates small against the target the MACs
        are within half the MACs of the gate at the boundary.

    Raises:
        ValueError: for another target, a gate without scores, or scores that are not finite numbers.
    """
    if not 0 < target <= 1:
        raise ValueError(f"masks_for_target: target must be in (0, 1], got {target!r}")
    gates = require_gates(model, "masks_for_target")
    for name, gate in gates.items():
        if name not in scores or scores[name].shape != (gate.num_gates,):
            found = tuple(scores[name].shape) if name in scores else "none"
            raise ValueError(f"masks_for_target: expected scores ({gate.num_gates},) of {name!r}, got {found}")
        if not scores[name].isfinite().all():
            raise ValueError(f"masks_for_target: the scores of {name!r} are not finite numbers")
    joined = torch.cat([scores[name].detach().double().cpu() for name in gates])
    order = joined.argsort(stable=True)
    sizes = [gate.num_gates for gate in gates.values()]
    full = float(expected_macs(model, _rates(gates, torch.ones_like(joined), sizes)))

    def share(closed: int) -> float:
        return float(expected_macs(model, _rates(gates, _mask(order, closed), sizes))) / full

    low, high = 0, len(order)  # closing more never adds MACs: the first count at or below the target
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= target else (middle + 1, high)
    if low and abs(share(low - 1) - target) < abs(share(low) - target):
        low -= 1
    mask = _mask(order, low).bool()
    return dict(zip(gates, mask.split(sizes), strict=True))


def fisher_information(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Fisher information of every gate at all gates open: the mean over samples of (dL/dg)^2; a collective.

    The straight-through gradient dL/dg is the first order of what closing a gate costs. In front of a norm (position
    "middle") the gradients of a block's gates sum to about 0, since the norm undoes a common scale: the first order
    then ranks channels within a block, not blocks. The second order does both: half the curvature, approximated by
    the empirical Fisher information with the data's own labels (Theis et al. 2018, for channels without gates). A gate
    with several calls closes in all of them: their gradients add up where each call has a row for every label.

    Args:
        model: a gated model; it is left as it is, and a copy in training mode is evaluated.
        batches: (images, labels); with several processes, of each its share. BatchNorm sees a process's own images.
        loss: (logits, labels) -> the mean loss of a batch.

    Returns:
        Per gate path (num_gates,), float64 on the CPU, in units of the loss.
    """
    probe = copied(model)
    probe.train()
    gates = require_gates(probe, "fisher_information")
    taps: dict[str, list[Tensor]] = {}

    def open_all(name: str) -> Callable[..., Tensor]:
        def hook(gate: nn.Module, args: object, output: Tensor) -> Tensor:
            mine = taps.setdefault(name, [])
            if not mine or len(output) != samples or len(mine[-1]) != samples:
                mine.append(torch.ones_like(output).requires_grad_())
            return mine[-1]  # the calls for the same samples close together

        return hook

    for name, gate in gates.items():
        gate.register_forward_hook(open_all(name))
    for parameter in probe.parameters():
        parameter.requires_grad_(False)
    totals = {name: _zeros(gate) for name, gate in gates.items()}
    count = samples = 0
    for images, labels in batches:
        taps.clear()  # a network may leave blocks out
        samples = len(labels)
        value = loss(probe(images), labels) * len(labels)  # of the mean, each sample would see 1/N
        pairs = [(name, tap) for name, mine in taps.items() for tap in mine]
        slopes = torch.autograd.grad(value, [tap for _, tap in pairs], materialize_grads=True)
        for (name, _), slope in zip(pairs, slopes, strict=True):
            totals[name] += slope.double().square().sum(0)
        count += len(labels)
    totals, counts = sum_over_ranks(totals, dict.fromkeys(gates, count))
    if not all(counts.values()):
        raise ValueError("fisher_information: expected at least one batch, got none")
    return {name: total.cpu() / counts[name] for name, total in totals.items()}


@torch.no_grad()
def mean_logits(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean logit (num_gates,) of every gate over the samples that reach it, in eval mode; float64 on the CPU.

    A collective.

    Args:
        model: a gated model; the mode of each of its modules is restored.
        batches: (images, labels); with several processes, of each its share, which may be none.
    """
    gates = require_gates(model, "mean_logits")
    totals = {name: _zeros(gate) for name, gate in gates.items()}
    counts = dict.fromkeys(gates, 0)
    with eval_mode(model):
        for images, _ in batches:
            for gate in gates.values():
                gate.forget()
            model(images)
            for name, gate in gates.items():
                if gate.logits is not None:
                    totals[name] += gate.logits.double().sum(0)
                    counts[name] += len(gate.logits)
    totals, counts = sum_over_ranks(totals, counts)
    return {name: total.cpu() / max(1, counts[name]) for name, total in totals.items()}


def gate_macs(model: nn.Module) -> dict[str, Tensor]:
    """MACs (num_gates,) that closing each single gate saves with all others open, at least 1."""
    gates = find_gates(model)
    sizes = [gate.num_gates for gate in gates.values()]
    rates = torch.ones(sum(sizes), dtype=torch.float32, requires_grad=True, device="cpu")
    macs = expected_macs(model, _rates(gates, rates, sizes))
    (slope,) = torch.autograd.grad(macs, rates)
    return dict(zip(gates, slope.double().clamp(min=1).split(sizes), strict=True))


def _zeros(gate: Gate) -> Tensor:
    """Zeros, float64 (num_gates,), on the gate's device; a rank without images needs them, too."""
    return torch.zeros_like(gate.running_open_rate, dtype=torch.float64)


def _rates(gates: Mapping[str, nn.Module], joined: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    return dict(zip(gates, joined.float().split(sizes), strict=True))


def _mask(order: Tensor, closed: int) -> Tensor:
    mask = torch.ones(len(order), dtype=torch.float32, device="cpu")
    mask[order[:closed]] = 0
    return mask
