"""How a run ends early: stop requests, the poll of all processes, and the exit code."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from gatedconv.train.distributed import Ranks, by_torchrun


class StopPoll:
    """Polls all processes now and then whether to stop, after the same steps on each of them.

    Steps take about as long everywhere; the main process measures them, and its message has the number of steps
    until the next poll. A single process polls after every step.

    Args:
        ranks: the processes.
        device: of their messages.
    """

    EVERY_S = 1.0  # each poll makes a GPU's host wait, and costs a message
    MOST_STEPS = 1000

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._every, self._steps, self._since = 1, 0, time.monotonic()

    def due(self) -> bool:
        """Count a step; whether to poll after it."""
        self._steps += 1
        return self._ranks.world == 1 or self._steps >= self._every

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is true on any process; a collective."""
        if self._ranks.world == 1:
            return list(flags)
        step_s = (time.monotonic() - self._since) / max(1, self._steps)
        every = min(self.MOST_STEPS, max(1, round(self.EVERY_S / max(step_s, 1e-6)))) if self._ranks.main else 0
        sums = self._ranks.sum(torch.tensor([*flags, every], dtype=torch.int32, device=self._device)).tolist()
        self._every, self._steps, self._since = sums[-1], 0, time.monotonic()
        return [count > 0 for count in sums[:-1]]


# The exit code of a run that a stop request or `max_minutes` ended: it can be resumed.
EXIT_CODE = 3


def exit_code() -> int:
    """The exit code of a run that ended early; 0 under torchrun, which restarts a job after any other."""
    return 0 if by_torchrun() else EXIT_CODE


class StopRequest:
    """Whether the run is to end.

    Attributes:
        requested: whether a stop has been requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context in which the loop polls `requested` and saves a checkpoint; outside, a request ends the process."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def request(self) -> None:
        """Request a stop. Raises SystemExit with `exit_code()` outside of `deferred`: there is nothing to save."""
        self.requested = True
        if not self._deferred:
            raise SystemExit(exit_code())


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Context in which SIGTERM requests a stop instead of ending the process.

    Outside the main thread, where Python handles no signals, a stop is never requested.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.request()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
