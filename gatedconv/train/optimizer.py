"""The optimizer: SGD in groups of parameters, the learning-rate schedule, and averaged weights (Lookahead)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gatedconv.gating import find_gates
from gatedconv.train.options import ScheduleOptions

LOOKAHEAD_EVERY = 5  # steps, as in Jordan 2024


def learning_rate(options: ScheduleOptions, epoch: float) -> float:
    """The learning rate after `epoch` epochs (a step within an epoch is a fraction of one)."""
    if epoch < options.warmup_epochs:
        # Never exactly 0: the first step would change nothing. Never above lr: a warm-up may be shorter than a step.
        return min(options.lr, options.lr * max(epoch, 0.01) / options.warmup_epochs)
    if options.schedule == "staged":
        passed = sum(epoch / options.epochs >= milestone for milestone in options.milestones)
        return options.lr * options.lr_decay**passed
    rest = max(options.epochs - options.warmup_epochs, 1e-9)
    fallen = min(1.0, (epoch - options.warmup_epochs) / rest)
    if options.schedule == "triangular":
        return options.lr * (1 - fallen * (1 - options.lr_end))
    return options.lr * 0.5 * (1 + math.cos(math.pi * fallen))


def make_optimizer(model: nn.Module, options: ScheduleOptions) -> torch.optim.SGD:
    """SGD in groups: weights, BatchNorm and biases, and, with learning rates of their own, gates and BatchNorm biases.

    Gates do not decay by default: decay pulls every logit to 0, where a gate flips.
    """
    of_gates = {id(p) for gate in find_gates(model).values() for p in gate.parameters()}
    of_norms = {id(m.bias) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    factor = options.norm_bias_lr_factor
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "norm biases": [], "gates": []}
    for parameter in model.parameters():
        kind = "gates" if id(parameter) in of_gates else "weights" if parameter.dim() > 1 else "norms"
        if kind == "norms" and factor != 1 and id(parameter) in of_norms:
            kind = "norm biases"
        if parameter.requires_grad:
            groups[kind].append(parameter)
    of_norm = options.weight_decay if options.norm_weight_decay else 0.0
    decay = {
        "weights": options.weight_decay,
        "norms": of_norm,
        "norm biases": of_norm / factor,
        "gates": options.gate_weight_decay,
    }
    factors = {"norm biases": factor, "gates": options.gate_lr_factor}
    optimizer = torch.optim.SGD(
        [
            {"params": found, "weight_decay": decay[kind], "lr_factor": factors.get(kind, 1.0)}
            for kind, found in groups.items()
            if found
        ],
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
        fused=True,
    )
    if options.momentum:
        # PyTorch creates them in the first step, and leaves them undefined if that step is skipped. From zeros
        # the first step is the same.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Lookahead:
    """Averaged weights: every few steps the weights become the mean of themselves and of their running mean.

    Lookahead (Zhang et al. 2019, arXiv:1907.08610) with a share that rises over the run (Jordan 2024): late in the run
    the weights move slowly around their mean while the learning rate is still high, and the run ends with the mean
    itself. Running statistics are averaged, too. Gates are not: a mean would open those that were pruned.

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
        if self._steps % LOOKAHEAD_EVERY == 0:
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
        """Continue from a state dict; KeyError, RuntimeError or TypeError where it is none of this network's."""
        means, steps = state["means"], state["steps"]
        if not isinstance(means, dict) or not isinstance(steps, int):
            raise TypeError("lookahead: expected means and steps")
        for name, mean in self.means.items():
            mean.copy_(means[name])
        self._steps = steps
