"""Leaving when asked to: SIGTERM ends a run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gatedconv.train.distributed import by_torchrun

# Also of a run that `max_minutes` ended: it can be resumed.
EXIT_CODE = 3


def exit_code() -> int:
    """Of a run that was ended early; torchrun has no code that ends a job for good but 0: of others it starts anew."""
    return 0 if by_torchrun() else EXIT_CODE


class StopRequest:
    """Whether somebody has asked the run to end.

    Attributes:
        made: whether they have.
    """

    def __init__(self) -> None:
        self.made = False
        self._patient = False

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """While it lasts, somebody looks at `made` and sees to the rest; at other times the process just ends."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def make(self) -> None:
        """Ask. Raises SystemExit with `exit_code()` where nobody looks: then nothing is there to be saved."""
        self.made = True
        if not self._patient:
            raise SystemExit(exit_code())


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """While it lasts, SIGTERM makes a request instead of ending the process.

    Outside the main thread, where Python takes no signals, the request is never made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.make()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
