"""Pruning gates while they train: those that matter least for their MACs close, until a MAC target is met.

The vote that makes all gates constants is in ``deploy.freeze``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.gating.collectives import global_mean, world_size
from gatedconv.gating.gates import Gate, LearnedGate
from gatedconv.gating.losses import global_open_rates
from gatedconv.gating.mac_terms import expected_macs
from gatedconv.gating.ranking import gate_macs
from gatedconv.gating.registry import require_gates, unwrap

EVERY = 20  # steps
MOMENTUM = 0.01  # of the running sensitivity: about the last hundred batches
CLOSED_LOGIT = -10.0  # outside the straight-through window, and too far for Gumbel noise


class GatePruner(nn.Module):
    """Measures how much the loss depends on each gate, and prunes the gates that matter least per MAC.

    The first-order change of the loss cannot rank gates: in front of a norm it sums to about 0. The second-order change
    is half the curvature, which is estimated by the empirical Fisher information, the mean over samples of
    (dL/dg)^2, which is a by-product of the backward pass (Theis et al. 2018, for channels without gates). L is the
    loss of the training step, regularization included where its gradient passes through the gate's output.

    A gate is pruned through its own parameters: with zero weights and a bias far below the estimator's window it is
    closed for every sample, receives no gradient and stays closed.

    Create it before training starts, since it needs about a hundred steps of gradients; call `step` after each
    optimizer step. It holds the model weakly.

    Args:
        model: a gated model that carries ``mac_terms``; forward hooks on its gates record gradients until `detach`.
        even: rank the channels of each gate among themselves and prune the same share of every gate; by default all
            gates are ranked together, so that the ranking also decides where in the network to prune.

    Attributes:
        sensitivity: float32 buffer (G,), running mean square of dL/dg of all gates of the model, in module order, for
            the loss of a single sample. A loss that is scaled, by a GradScaler or 1/k of an accumulated step, scales it
            by the square, and the ranks not at all.
        pruned: bool buffer (G,), the gates closed so far.

    Raises:
        ValueError: if the model has no gates, carries no ``mac_terms``, or has a gate that is frozen.
    """

    sensitivity: Tensor
    pruned: Tensor
    costs: Tensor

    def __init__(self, model: nn.Module, *, even: bool = False) -> None:
        super().__init__()
        self._even = even
        gates = require_gates(model, "GatePruner")
        fixed = [name for name, gate in gates.items() if not isinstance(gate, LearnedGate)]
        if fixed:
            raise ValueError(f"GatePruner: expected gates that learn, {fixed[0]!r} does not")
        self._model = weakref.ref(unwrap(model))  # not strongly: whatever caches a gate would keep the model alive
        self._gates = {name: gate for name, gate in gates.items() if isinstance(gate, LearnedGate)}
        self._sizes = [gate.num_gates for gate in gates.values()]
        self._steps = 0
        self._target = self._reached = 0.0  # of the last step, and of the last pruning
        self._left = 0.0  # share of the MACs after the last pruning
        costs = gate_macs(model)
        self.register_buffer("sensitivity", torch.zeros(sum(self._sizes)))
        self.register_buffer("pruned", torch.zeros(sum(self._sizes), dtype=torch.bool))
        self.register_buffer("costs", torch.cat([costs[name] for name in gates]).float(), persistent=False)
        ends = list(accumulate(self._sizes))
        self._hooks = [
            gate.register_forward_hook(_Watch(lambda: self.sensitivity, slice(end - size, end), gate))
            for gate, size, end in zip(gates.values(), self._sizes, ends, strict=True)
        ]
        for gate in gates.values():
            gate.needs_gradient = True

    def detach(self) -> None:
        """Remove the hooks from the gates; the sensitivities stay as they are."""
        for hook in self._hooks:
            hook.remove()
        for gate in self._gates.values():
            gate.needs_gradient = False

    def average_over_ranks(self) -> None:
        """Replace the sensitivities by their mean over all ranks, as a checkpoint needs it; a collective."""
        if world_size() > 1:
            self.sensitivity.copy_(global_mean(self.sensitivity, 1))

    def get_extra_state(self) -> tuple[int, float, float]:
        """Return the number of steps, the last target and the one that was pruned to: part of the state dict."""
        return self._steps, self._target, self._reached

    def set_extra_state(self, state: tuple[int, float, float]) -> None:
        """Restore what `get_extra_state` returned."""
        self._steps, self._target, self._reached = state

    def step(self, target: float) -> None:
        """Count a training step; `prune` in every 20th, since pruning synchronizes, and once the target stops falling.

        Args:
            target: share of the dense model's MACs, in (0, 1]; lower it step by step, for example by
                `gatedconv.schedules.falling`.

        Raises:
            TypeError, ValueError: another target, or one before any forward pass.
        """
        _require_target(target)
        self._steps += 1
        behind = target == self._target < self._reached
        if behind or self._steps % EVERY == 0:
            self._prune(target)
        self._target = target

    def finish(self, target: float) -> None:
        """`prune` at the end of training, unless `step` has reached the target; arguments as `prune`.

        Warns:
            UserWarning: more MACs than the target are left.
        """
        if not self._reached or target < self._reached:
            self._prune(target)
        if self._left > target:
            warnings.warn(
                f"GatePruner: {self._left:.1%} of the MACs are left, the target is {target:.1%}; gates that are not "
                f"trained stay as they are, and the last open one stays open",
                stacklevel=2,
            )

    def prune(self, target: float) -> None:
        """Close gates until the MACs at the last batch's open rates are at most ``target`` of the dense model's.

        Synchronizes with the device. Pruned gates are closed again if the optimizer's momentum moved them.

        Args:
            target: share of the dense model's MACs, in (0, 1].

        Raises:
            ValueError: for another target, or before any forward pass.

        Warns:
            UserWarning: no gradient has reached the gates, so that they close in the order of the network.
        """
        self._prune(target)

    @torch.no_grad()
    def _prune(self, target: float) -> None:
        _require_target(target)
        found = global_open_rates(self._pruned_model(), "GatePruner")
        self._reached = target
        rates = torch.cat([rate.detach() for rate in found.values()]).float()
        sensitivity = self.sensitivity if world_size() == 1 else global_mean(self.sensitivity, 1)
        if not bool(sensitivity.any()):
            warnings.warn(
                "GatePruner: no gradient has reached the gates yet, so that they close in the order of the network",
                stacklevel=4,  # of the caller of the public method, past the decorator
            )
        left = ~self.pruned & self._learning()
        order = self._scores(sensitivity).masked_fill(~left, torch.inf).argsort(stable=True).tolist()
        full = self._macs(torch.ones_like(rates))
        rates[self.pruned] = 0
        for gate in order[: min(int(left.sum()), int((~self.pruned).sum()) - 1)]:
            if self._macs(rates) <= target * full:
                break
            rates[gate] = 0
            self.pruned[gate] = True
        self._left = self._macs(rates) / full
        for learned, mask in zip(self._gates.values(), self.pruned.split(self._sizes), strict=True):
            learned.fc2.weight.masked_fill_(mask[:, None], 0)
            learned.fc2.bias.masked_fill_(mask, CLOSED_LOGIT)
            learned.running_open_rate.masked_fill_(mask, 0)  # for a freeze without a vote

    def _learning(self) -> Tensor:
        """Bool (G,): the gates whose parameters are trained; the others have no gradient to rank them by, and stay."""
        parts = zip(self._gates.values(), self._sizes, strict=True)
        trained = [torch.full((size,), gate.fc2.bias.requires_grad) for gate, size in parts]
        return torch.cat(trained).to(self.pruned.device)

    def _scores(self, sensitivity: Tensor) -> Tensor:
        """Scores (G,), lowest pruned first: sensitivity per MAC or, if even, the rank (0 to 1) within the gate."""
        if not self._even:
            return sensitivity / self.costs
        # Pruned channels rank lowest: their sensitivity no longer means anything.
        parts = sensitivity.masked_fill(self.pruned, -1.0).split(self._sizes)
        return torch.cat([(part.argsort().argsort() + 0.5) / len(part) for part in parts])

    def _macs(self, rates: Tensor) -> float:
        named = dict(zip(self._gates, rates.split(self._sizes), strict=True))
        return float(expected_macs(self._pruned_model(), named))

    def _pruned_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("GatePruner: its model no longer exists")
        return model


class _Watch:
    """The forward hook of a gate that records the gradients of its decisions; a copy of the gate records nothing.

    Args:
        sensitivity: of all gates; a part of it is updated in place.
        place: that part.
        gate: of several calls the squares add up, as those of independent gradients do.
    """

    def __init__(self, sensitivity: Callable[[], Tensor], place: slice, gate: Gate) -> None:
        self.sensitivity, self.place = sensitivity, place
        # The squares leave the graph as the gradient of a leaf, which is their sum over the calls, and since a compiled
        # backward pass must not change buffers.
        self.probe = torch.zeros_like(gate.running_open_rate, dtype=torch.float32, requires_grad=True)
        self.probe.register_post_accumulate_grad_hook(self._on_squares)

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        """Of copies and pickles: the pruner stays with the original."""
        return _Unwatched, ()

    def __call__(self, gate: Gate, arguments: object, decision: Tensor) -> Tensor | None:
        if not decision.requires_grad:
            return None
        if gate.calls == 1 and not torch.compiler.is_compiling():
            decision.register_hook(self._on_gradient)
            return None
        watched: Tensor = _Watched.apply(decision, self.probe)
        if isinstance(gate, LearnedGate) and gate.logits is not None and gate.logits.dtype == watched.dtype:
            # So that the losses reach the decision, as they do in eager mode.
            gate.replace_open_rate(watched.mean(dim=0))
        return watched

    def _on_gradient(self, slope: Tensor) -> None:
        self._update(_mean_square(slope.detach()))

    def _on_squares(self, probe: Tensor) -> None:
        square, probe.grad = probe.grad, None
        assert square is not None  # the hook runs after accumulation
        self._update(square)

    @torch.no_grad()
    def _update(self, square: Tensor) -> None:
        running = self.sensitivity()[self.place]
        square = torch.where(square.isfinite(), square.to(running.device), running)  # fp16 may overflow
        running.lerp_(square, MOMENTUM)


class _Unwatched:
    """The hook of a copy of a watched gate."""

    def __call__(self, gate: nn.Module, arguments: object, decision: Tensor) -> None:
        """Record nothing."""


def _require_target(target: float) -> None:
    if isinstance(target, bool) or not isinstance(target, (int, float)):
        raise TypeError(f"GatePruner: target must be a number in (0, 1], got {target!r}")
    if not 0 < target <= 1:
        raise ValueError(f"GatePruner: target must be in (0, 1], got {target!r}")


class _Watched(torch.autograd.Function):
    """The identity of a decision (N, G); ``probe`` (G,) receives the mean square of the samples' gradients."""

    @staticmethod
    def forward(ctx: Any, decision: Tensor, probe: Tensor) -> Tensor:
        ctx.device = probe.device
        return decision.view_as(decision)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        return slope, _mean_square(slope).to(ctx.device)


def _mean_square(slope: Tensor) -> Tensor:
    # The loss is a mean over the batch, so that each sample contributes 1/N.
    return slope.float().square().mean(0) * len(slope) ** 2
