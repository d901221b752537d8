"""Averaged weights: Lookahead (Zhang et al. 2019, arXiv:1907.08610) with a share that rises over the run (Jordan 2024).

Every few steps the weights become the mean of themselves and of their running mean. Late in the run the weights thus
move slowly around their mean while the learning rate is still high; the run ends with the mean itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedconv.gating import find_gates
from gatedconv.train.config import ScheduleOptions

EVERY = 5  # steps, as in Jordan 2024


def make_lookahead(model: nn.Module, options: ScheduleOptions) -> Lookahead | None:
    """The averaged weights that `options` ask for."""
    return Lookahead(model, options.lookahead) if options.lookahead else None


class Lookahead:
    """Running means of a network's parameters and running statistics, gates aside, which they are pulled to.

    Gates are left out: a mean would open those that were pruned.

    Args:
        model: the network.
        share: of the running mean in the weights at the end of the run, in (0, 1).

    Attributes:
        means: the running means by name, as in the network's state dict.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        of_gates = tuple(f"{name}." for name in find_gates(model))
        self._live: dict[str, Tensor] = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and not name.startswith(of_gates)
        }
        self.means = {name: tensor.clone() for name, tensor in self._live.items()}
        self._share, self._steps = share, 0

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Count a step, at a progress in [0, 1]; average in every 5th."""
        self._steps += 1
        if self._steps % EVERY == 0:
            kept = self._share * progress**3
            for name, mean in self.means.items():
                mean.lerp_(self._live[name], 1 - kept)
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the weights by their running means."""
        for name, mean in self.means.items():
            self._live[name].copy_(mean)

    @torch.no_grad()
    def start_from(self, other: Lookahead) -> None:
        """Continue from the running means of a network that has all of this one's weights."""
        for name, mean in self.means.items():
            mean.copy_(other.means[name])
        self._steps = other._steps

    def state_dict(self) -> dict[str, object]:
        """The running means and the number of steps."""
        return {"means": self.means, "steps": self._steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from a state dict; KeyError or RuntimeError where it is that of another network."""
        means, steps = state["means"], state["steps"]
        assert isinstance(means, dict) and isinstance(steps, int)
        for name, mean in self.means.items():
            mean.copy_(means[name])
        self._steps = steps
