"""Skipping, in training, the branch of a block whose layer gate is closed for the whole batch.

If every logit is below -1, the gate is 0 for every sample: the branch adds nothing, and by eq. 4 no gradient passes.
Neither branch nor gate would learn anything from the batch, so skipping the branch is exact. Its parameters get zero
gradients, not none: momentum and weight decay act on them as usual, and DistributedDataParallel finds every gradient.
The running statistics of the branch's BatchNorm keep their values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.gating import Gate
from gatedconv.gating.gates import LearnedGate


class BlockSkip:
    """Decides whether a block is skipped in the current step.

    Attributes:
        now: decide from this step's logits, which synchronizes with a GPU; if False, the trainer sets ``closed`` to
            a prediction and verifies it after the step.
        closed: the last decision.
    """

    def __init__(self, *, now: bool) -> None:
        self.now = now
        self.closed = False

    def applies(self, gate: Gate) -> bool:
        """Return whether to skip the block; its layer gate has just processed the batch."""
        if self.now:
            self.closed = bool(is_closed(gate))
        return self.closed


def is_closed(gate: Gate) -> Tensor:
    """Bool (): whether a layer gate closes its block for the whole last batch and nothing needs the branch.

    Where ``gate.needs_gradient`` is set, the branch is computed until the gate's last layer has no weights any more,
    that is, until it can never open again.
    """
    closed = gate.dead.all()
    if isinstance(gate, LearnedGate) and gate.needs_gradient:
        return closed & ~gate.fc2.weight.any()
    return closed


def skip_branch(shortcut: Tensor, block: nn.Module) -> Tensor:
    """The output of a block whose branch is skipped, relu(shortcut); gradients of its parameters are zeros.

    Args:
        shortcut: (N, C, H, W).
        block: its parameters outside ``downsample`` get zero gradients.
    """
    idle = [p for name, p in block.named_parameters() if not name.startswith("downsample.") and p.requires_grad]
    passed: Tensor = _SkippedBranch.apply(shortcut, *idle)
    return torch.relu(passed)


class _SkippedBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return shortcut.view_as(shortcut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))
