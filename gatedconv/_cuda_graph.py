"""The one place that captures CUDA graphs: for the engine, its tuner, training and benchmarks."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Beginning a capture synchronizes the device, which invalidates a capture that another thread has under way there.
_locks: defaultdict[int, threading.RLock] = defaultdict(threading.RLock)
_locks_lock = threading.Lock()
# cudaErrorStreamCaptureInvalidated and its companions, as PyTorch words them.
_INVALIDATED = ("capture invalidated", "previous error during capture", "not permitted when stream is capturing")


def capture(
    call: Callable[[], Result], device: torch.device, stream: torch.cuda.Stream | None = None, retries: int = 1
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture what a call launches; nothing of it has run yet.

    Captures of one device run one at a time. Other threads may allocate meanwhile; one that synchronizes the device
    invalidates the capture, which is then tried again.

    Args:
        call: Must have run before, so that libraries are loaded and algorithms chosen.
        device: Where it launches.
        stream: To capture on; None for one of PyTorch's own.
        retries: How often an invalidated capture is repeated, and with it what the call does on the host.

    Returns:
        The graph, and what the call returned: tensors that every replay writes anew.

    Raises:
        RuntimeError: The call does what no graph can hold, or every attempt was invalidated.
    """
    with lock_of(device), torch.cuda.device(device):
        for attempt in range(retries + 1):
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    result = call()
                return graph, result
            except RuntimeError as error:
                if attempt == retries or not any(words in str(error) for words in _INVALIDATED):
                    raise
    raise AssertionError("unreachable")


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Context that launches on a stream, in order with what the current one has launched before and launches after."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def lock_of(device: torch.device) -> threading.RLock:
    """Return the lock of all captures on a device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    with _locks_lock:
        return _locks[index]
