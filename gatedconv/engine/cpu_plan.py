"""A packed segment as a module."""

from __future__ import annotations

from torch import Tensor, nn

from gatedconv.engine.plan_writer import Program
from gatedconv.ops.plan import plan_check, plan_run


class PlanModule(nn.Module):
    """A segment of a network, packed: (N, C, H, W) float32 -> (N, C', H', W') or (N, C')."""

    program: Tensor
    weights: Tensor

    def __init__(self, packed: Program, threads: int = 0) -> None:
        super().__init__()
        self.register_buffer("program", packed.code)
        self.register_buffer("weights", packed.weights)
        self.shape = packed.shape
        self.threads = threads  # 0: as many as PyTorch uses
        self.steps = packed.steps
        self.maps = packed.maps

    def forward(self, x: Tensor) -> Tensor:
        """Run the plan in one operator call."""
        plan_check(x.shape, self.shape)
        return plan_run(x, self.program, self.weights, self.shape, self.threads)
