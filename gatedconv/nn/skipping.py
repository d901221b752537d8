"""Leaving out, in training, a block that its layer gate shuts for the whole batch.

Where every logit lies below -1 the gate is 0 for every sample, so that the branch adds nothing, and eq. 4 lets
no gradient through: neither branch nor gate would learn anything from the batch. Leaving the branch out is
exact. Its parameters get zeros for a gradient, not none: momentum and weight decay act on them as ever, and
DistributedDataParallel waits for nobody. The branch's BatchNorm statistics stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.gating import Gate
from gatedconv.gating.gate import LearnedGate


class BlockSkip:
    """Whether a block is left out of the current step.

    Attributes:
        now: decide from this step's logits, which makes the host wait where they are on a GPU; else ``shut``
            is set from outside, and has to be verified afterwards.
        shut: the last decision.
    """

    def __init__(self, *, now: bool) -> None:
        self.now = now
        self.shut = False

    def applies(self, gate: Gate) -> bool:
        """Whether to leave the block out, its layer gate having just seen the batch."""
        if self.now:
            self.shut = bool(is_shut(gate))
        return self.shut


def is_shut(gate: Gate) -> Tensor:
    """Bool (): whether a layer gate that has just seen a batch shuts its block for all of it, unmissed.

    A gate with a forward hook is watched, by a `Shutter` say, which wants to know what opening it would gain:
    its block is computed for as long as the gate reads its input at all.
    """
    shut = gate.dead.all()
    weight = gate.fc2.weight if isinstance(gate, LearnedGate) else None
    return shut & ~weight.any() if gate._forward_hooks and weight is not None else shut


def left_out(shortcut: Tensor, block: nn.Module) -> Tensor:
    """The output of a block whose branch is left out: relu(shortcut), zeros for its parameters' gradients.

    Args:
        shortcut: (N, C, H, W).
        block: its parameters outside ``downsample`` are those that get zeros.
    """
    idle = [p for name, p in block.named_parameters() if not name.startswith("downsample.") and p.requires_grad]
    passed: Tensor = _LeftOut.apply(shortcut, *idle)
    return torch.relu(passed)


class _LeftOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return shortcut.view_as(shortcut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))
