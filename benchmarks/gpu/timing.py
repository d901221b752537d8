"""Times of a call on a GPU: medians of CUDA events, CUDA graphs, launches by the profiler, peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

WARM_UP = 10
ROUNDS = 30
ROUND_MS = 20.0  # of a round: long enough that an event's half microsecond does not show


def measure(call: Call) -> dict[str, float]:
    """Milliseconds per call: ``ms_median``, ``ms_min`` and ``ms_iqr`` over rounds of many calls each."""
    for _ in range(WARM_UP):
        call()
    repeats = max(1, min(200, int(ROUND_MS / max(_round(call, 3), 1e-3))))
    times = sorted(_round(call, repeats) for _ in range(ROUNDS))
    quarters = statistics.quantiles(times, n=4)
    return {"ms_median": statistics.median(times), "ms_min": times[0], "ms_iqr": quarters[2] - quarters[0]}


def _round(call: Call, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def captured(call: Call) -> Call:
    """The call as a CUDA graph; it must not wait for the device nor depend on fresh input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels and lets cuDNN choose
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    replay = graph.replay

    def run() -> Any:
        replay()
        return kept

    return run


def count_launches(call: Call) -> int:
    """Kernels that one call launches; copies and fills by the driver are not counted."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return count_kernels((event.device_type.name, event.name) for event in profile.events())


def count_kernels(events: Any) -> int:
    """Count the kernels among (device type, name) pairs."""
    return sum(device == "CUDA" and not name.startswith(("Memcpy", "Memset")) for device, name in events)


def peak_bytes(call: Call) -> int:
    """Bytes that one call needs at most, beyond what is held before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
