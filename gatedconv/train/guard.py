"""Steps whose numbers are not finite: skipped, counted, and after a few of them the run stops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# More than this many bad steps in a row, or this many in an epoch, are no accident.
MOST_IN_A_ROW = 3
MOST_IN_AN_EPOCH = 20


def judged_at_once(device: torch.device) -> bool:
    """Whether each step is judged before the next one, which would make a GPU wait."""
    return device.type == "cpu"


class Buffers:
    """A copy of a network's buffers (running statistics), to go back to."""

    def __init__(self, model: nn.Module) -> None:
        self._live = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def put_back(self, *, only_broken: bool = False) -> None:
        """Make them what they were; with ``only_broken`` those alone that are no longer finite."""
        for live, kept in zip(self._live, self._kept, strict=True):
            if not only_broken or (live.is_floating_point() and not bool(live.isfinite().all())):
                live.copy_(kept)


class StepGuard:
    """Keeps steps without a finite loss and gradient out of the weights.

    On the CPU each step is judged at once. On a GPU the optimiser's kernel itself leaves the weights alone,
    so that the host need not wait, and `settle`, called now and then, repairs the running statistics.

    Attributes:
        skipped: int64 (), bad steps of this epoch.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.buffers = Buffers(model)
        self.skipped, self._row, self._longest = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "row": self._row, "longest": self._longest}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from counts; KeyError where one is missing."""
        for name, count in self.state_dict().items():
            count.copy_(state[name])

    def new_epoch(self) -> None:
        """Count from 0 again."""
        self.skipped.zero_()
        self._longest.copy_(self._row)

    def count(self, bad: Tensor) -> None:
        """Take in whether a step, bool (), was bad."""
        self.skipped += bad
        self._row.add_(1).mul_(bad)
        torch.maximum(self._longest, self._row, out=self._longest)

    def settle(self) -> str | None:
        """Repair what bad steps left behind; why the run should stop, if it should. Waits for the device."""
        skipped, longest = int(self.skipped), int(self._longest)
        if longest:
            self.buffers.put_back(only_broken=True)
        else:
            self.buffers.keep()
        if longest > MOST_IN_A_ROW:
            return f"{longest} steps in a row"
        if skipped > MOST_IN_AN_EPOCH:
            return f"{skipped} steps of an epoch"
        return None
