"""What processes that train together ask each other now and then: whether to stop, whether to write a checkpoint."""

from __future__ import annotations

import time

import torch

from gatedconv.train.distributed import Ranks

# Seconds between two questions: each makes a GPU's host wait, and costs a message.
EVERY_S = 1.0
_MOST_STEPS = 1000


class Questions:
    """Says in which steps to ask, the same ones on every process, and asks.

    Steps last about as long everywhere; the main process measures them, and its answer carries the number of steps
    until the next question. A process alone asks itself after every step.

    Args:
        ranks: the processes.
        device: where their messages travel.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._every, self._steps, self._since = 1, 0, time.monotonic()

    def due(self) -> bool:
        """Count a step; whether to ask after it."""
        self._steps += 1
        return self._ranks.world == 1 or self._steps >= self._every

    def ask(self, *wishes: bool) -> list[bool]:
        """What any of the processes wishes; a collective."""
        if self._ranks.world == 1:
            return list(wishes)
        step_s = (time.monotonic() - self._since) / max(1, self._steps)
        every = min(_MOST_STEPS, max(1, round(EVERY_S / max(step_s, 1e-6)))) if self._ranks.main else 0
        told = self._ranks.sum(torch.tensor([*wishes, every], dtype=torch.int32, device=self._device)).tolist()
        self._every, self._steps, self._since = told[-1], 0, time.monotonic()
        return [count > 0 for count in told[:-1]]
