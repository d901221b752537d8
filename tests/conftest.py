import ctypes
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data._utils import signal_handling


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_handler_of_dead_children() -> Iterator[None]:
    """PyTorch's DataLoader leaves a handler of SIGCHLD behind, and OpenVINO an alternate stack that it unmaps.

    Whatever starts a process in a later test would crash when that process ends.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
        signal_handling._SIGCHLD_handler_set = False


class _Stack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def _signals_on_the_stack_that_is_there() -> None:
    """No alternate stack: OpenVINO unmaps the one that it has put there, and the next signal would crash."""
    disable = 2  # SS_DISABLE
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(None, disable, 0)), None)
