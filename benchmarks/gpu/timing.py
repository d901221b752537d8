"""Times of a call on a GPU: medians of CUDA events, CUDA graphs, launches by the profiler, peak memory.

A dry machine goes through the same calls on a CPU; what it returns means nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Call = Callable[[], Any]

WARM_UP = 10
ROUNDS = 30
ROUND_MS = 20.0  # of a round: long enough that an event's half microsecond does not show


class Machine:
    """Where calls are timed."""

    def __init__(self, dry: bool = False) -> None:
        self.dry = dry
        self.device = "cpu" if dry else "cuda"

    def values(self, call: Call, graph: bool, inner: bool = True) -> dict[str, Any]:
        """Fields of a row: times; launches and memory where ``inner``, which a captured call hides."""
        launches = self.count_launches(call) if inner and not graph else None
        memory = self.peak_bytes(call) if inner and not graph else None
        return {
            **self.measure(self.captured(call) if graph else call), "launches": launches, "bytes_peak": memory
        }  # fmt: skip

    def measure(self, call: Call) -> dict[str, float]:
        """Milliseconds per call: ``ms_median``, ``ms_min`` and ``ms_iqr`` over rounds of many calls each."""
        for _ in range(1 if self.dry else WARM_UP):
            call()
        repeats = 1 if self.dry else max(1, min(200, int(ROUND_MS / max(self._round(call, 3), 1e-3))))
        times = sorted(self._round(call, repeats) for _ in range(2 if self.dry else ROUNDS))
        quarters = statistics.quantiles(times, n=4)
        return {"ms_median": statistics.median(times), "ms_min": times[0], "ms_iqr": quarters[2] - quarters[0]}

    def _round(self, call: Call, repeats: int) -> float:
        if self.dry:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats

    def captured(self, call: Call) -> Call:
        """The call as a CUDA graph; it must not wait for the device nor depend on fresh input.

        Warm-up and capture share a stream, because PyTorch binds what accumulates gradients to the stream of the
        first backward.
        """
        if self.dry:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles kernels and lets cuDNN choose
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()
        replay = graph.replay

        def run() -> Any:
            replay()
            return kept

        return run

    def count_launches(self, call: Call) -> int:
        """Kernels that one call launches; copies and fills by the driver are not counted."""
        call()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not self.dry:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            if not self.dry:
                torch.cuda.synchronize()
        # Ranges that somebody named lie on the device too.
        events = (event for event in profile.events() if not getattr(event, "is_user_annotation", False))
        return count_kernels((event.device_type.name, event.name) for event in events)

    def peak_bytes(self, call: Call) -> int:
        """Bytes that one call needs at most, beyond what is held before it."""
        call()
        if self.dry:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def compile(self, function: Callable[..., Any], mode: str, fullgraph: bool) -> Callable[..., Any]:
        """`torch.compile`; without its backend on a dry machine."""
        torch._dynamo.reset()
        if self.dry:
            return torch.compile(function, backend="eager", fullgraph=fullgraph)
        return torch.compile(function, mode=mode, fullgraph=fullgraph)

    def clean(self) -> None:
        """Give back what the last case held."""
        if not self.dry:
            torch.cuda.empty_cache()


def count_kernels(events: Iterable[tuple[str, str]]) -> int:
    """Count the kernels among (device type, name) pairs."""
    return sum(device == "CUDA" and not name.startswith(("Memcpy", "Memset")) for device, name in events)
