"""Shutting gates one by one, those that matter least for their MACs first, until the MACs are as wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.gating.costs import expected_macs
from gatedconv.gating.gate import LearnedGate
from gatedconv.gating.losses import global_open_rates
from gatedconv.gating.ranking import gate_macs
from gatedconv.gating.ranks import global_mean, world_size
from gatedconv.gating.registry import require_gates, unwrap

EVERY = 20  # steps
MOMENTUM = 0.01  # of the running sensitivity: about the last hundred batches
SHUT_LOGIT = -10.0  # beyond the straight-through window, and too far for Gumbel noise


class Shutter(nn.Module):
    """Watches what each gate matters for the loss, and shuts for good those that matter least per MAC.

    What closing a gate costs is, to second order, half its curvature, since the first order adds up to 0 over
    the gates of a norm's input; the mean square of the gradient that arrives at the gate, sample by sample,
    stands for the curvature (Fisher information; Theis et al. 2018, for channels without gates). It is a
    by-product of the backward pass. A gate is shut by its parameters alone: no weight, and a bias far below the
    estimator's window, so that it is shut for every sample, gets no gradient, and stays shut.

    Args:
        model: a gated model that carries ``mac_terms``; its gates are watched from now on, until ``detach``.
        even: rank the channels of each gate among themselves and shut the same share of every gate; otherwise all
            are ranked together, and the ranks decide between gates too.

    Attributes:
        sensitivity: buffer (G,), running mean square of dL/dg of all gates of the model, in module order, in
            units of a sample's loss.
        shut: bool buffer (G,), what has been shut.
    """

    sensitivity: Tensor
    shut: Tensor
    costs: Tensor

    def __init__(self, model: nn.Module, *, even: bool = False) -> None:
        super().__init__()
        self._even = even
        gates = require_gates(model, "Shutter")
        fixed = [name for name, gate in gates.items() if not isinstance(gate, LearnedGate)]
        if fixed:
            raise ValueError(f"Shutter: expected gates that learn, {fixed[0]!r} does not")
        self._model = [unwrap(model)]  # in a list: the model is no part of this module's state
        self._gates = {name: gate for name, gate in gates.items() if isinstance(gate, LearnedGate)}
        self._sizes = [gate.num_gates for gate in gates.values()]
        self._steps = 0
        costs = gate_macs(model)
        self.register_buffer("sensitivity", torch.zeros(sum(self._sizes)))
        self.register_buffer("shut", torch.zeros(sum(self._sizes), dtype=torch.bool))
        self.register_buffer("costs", torch.cat([costs[name] for name in gates]).float(), persistent=False)
        ends = torch.tensor(self._sizes).cumsum(0).tolist()
        self._hooks = [
            gate.register_forward_hook(self._watch(slice(end - size, end), gate.running_open_rate.device))
            for gate, size, end in zip(gates.values(), self._sizes, ends, strict=True)
        ]

    def detach(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def join(self) -> None:
        """Give every process the mean of the sensitivities, of which a checkpoint holds one; a collective."""
        if world_size() > 1:
            self.sensitivity.copy_(global_mean(self.sensitivity, 1))

    def get_extra_state(self) -> int:
        """Steps so far; part of the state dict."""
        return self._steps

    def set_extra_state(self, state: int) -> None:
        """Go on from a state dict."""
        self._steps = int(state)

    def step(self, wanted: float) -> None:
        """Count a step, and `settle` every `EVERY` of them: a GPU has to be waited for."""
        self._steps += 1
        if self._steps % EVERY == 0:
            self.settle(wanted)

    @torch.no_grad()
    def settle(self, wanted: float) -> None:
        """Shut gates until the MACs at the last batch's open rates are at most ``wanted`` of the dense model's.

        Waits for the device. Gates that are shut stay so, whatever the optimiser's momentum still does to them.

        Args:
            wanted: share of the dense MACs, in (0, 1].
        """
        if not 0 < wanted <= 1:
            raise ValueError(f"Shutter: wanted must be in (0, 1], got {wanted!r}")
        found = global_open_rates(self._model[0], "Shutter")
        rates = torch.cat([rate.detach() for rate in found.values()]).float()
        sensitivity = self.sensitivity if world_size() == 1 else global_mean(self.sensitivity, 1)
        order = self._scores(sensitivity).masked_fill(self.shut, torch.inf).argsort(stable=True).tolist()
        full = self._macs(torch.ones_like(rates))
        rates[self.shut] = 0
        for gate in order[: int((~self.shut).sum()) - 1]:
            if self._macs(rates) <= wanted * full:
                break
            rates[gate] = 0
            self.shut[gate] = True
        for learned, mask in zip(self._gates.values(), self.shut.split(self._sizes), strict=True):
            learned.fc2.weight.masked_fill_(mask[:, None], 0)
            learned.fc2.bias.masked_fill_(mask, SHUT_LOGIT)

    def _scores(self, sensitivity: Tensor) -> Tensor:
        """What is shut first has the least: sensitivity per MAC, or the place (0 to 1) within a gate."""
        if not self._even:
            return sensitivity / self.costs
        # What is shut comes first, whatever its sensitivity does by now.
        parts = sensitivity.masked_fill(self.shut, -1.0).split(self._sizes)
        return torch.cat([(part.argsort().argsort() + 0.5) / len(part) for part in parts])

    def _macs(self, rates: Tensor) -> float:
        named = dict(zip(self._gates, rates.split(self._sizes), strict=True))
        return float(expected_macs(self._model[0], named))

    def _watch(self, place: slice, device: torch.device) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
        # A leaf of the graph brings the squares out of it: a compiled backward pass may change no buffer.
        probe = torch.zeros(place.stop - place.start, device=device, requires_grad=True)

        def take_in(square: Tensor) -> None:
            running = self.sensitivity[place]
            square = torch.where(square.isfinite(), square.to(running.device), running)  # fp16 may overflow
            running.lerp_(square, MOMENTUM)

        def on_gradient(slope: Tensor) -> None:
            take_in(_mean_square(slope.detach()))

        def on_squares(probe: Tensor) -> None:
            square, probe.grad = probe.grad, None
            assert square is not None  # it has just been added
            take_in(square)

        def on_forward(gate: nn.Module, arguments: object, decision: Tensor) -> Tensor | None:
            if not (gate.training and decision.requires_grad):
                return None
            if not torch.compiler.is_compiling():
                decision.register_hook(on_gradient)
                return None
            watched: Tensor = _Watched.apply(decision, probe)
            if isinstance(gate, LearnedGate) and gate.logits is not None and gate.logits.dtype == watched.dtype:
                gate.open_rate = watched.mean(dim=0)  # as without a compiler, losses on it arrive at the decision
            return watched

        probe.register_post_accumulate_grad_hook(on_squares)
        return on_forward


class _Watched(torch.autograd.Function):
    """A decision (N, G), and for the gradient of its probe (G,) the mean square of each sample's own."""

    @staticmethod
    def forward(ctx: Any, decision: Tensor, probe: Tensor) -> Tensor:
        ctx.device = probe.device
        return decision.view_as(decision)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        return slope, _mean_square(slope).to(ctx.device)


def _mean_square(slope: Tensor) -> Tensor:
    # Of a mean over the batch each sample sees 1/N.
    return slope.float().square().mean(0) * len(slope) ** 2
