"""Times the candidates for a convolution on the GPU of this machine."""

from __future__ import annotations

import hashlib
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedconv import _build, _native
from gatedconv._cuda_graph import capture, on_stream
from gatedconv.engine.tuner import Tuner, cache_path


def header_of(device: torch.device) -> dict[str, Any]:
    """Return what choices on a device depend on in addition to the shapes."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{properties.name}, {properties.multi_processor_count} processors",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        # The time and the result of cuDNN's candidates depend on them.
        "flags": {
            "benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
            "precision": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        },
        "sources": f"{_build.source_hash(_native.source_folder())} {planner_hash(Path(__file__).parent)}",
    }


def planner_hash(folder: Path) -> str:
    """Hash the Python files that decide what a candidate computes."""
    files = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)).hexdigest()[:16]


def time_on_gpu(call: Callable[[], Tensor], rounds: int = 7, repeats: int = 10) -> float:
    """Return the median milliseconds of a call as part of a CUDA graph, which is how a plan runs it."""
    stream = torch.cuda.Stream()
    with on_stream(stream):
        call()  # warm-up: allocations and choices made once
        graph, _ = capture(lambda: [call() for _ in range(repeats)], stream.device, stream)
        graph.replay()
        times = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / repeats)
    return statistics.median(times)


_tuners: dict[str, Tuner] = {}
_tuners_lock = threading.Lock()


def tuner_for(device: torch.device) -> Tuner:
    """Return this process's tuner of a CUDA device."""
    with _tuners_lock:
        header = header_of(device)
        path = cache_path(header)
        if str(path) not in _tuners:
            _tuners[str(path)] = Tuner(path, header, time_on_gpu)
        return _tuners[str(path)]
