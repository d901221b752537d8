"""Result files of all benchmarks and their header, and times on a GPU.

A result file is JSON: the ``machine`` (`machine_header`), ``rows`` (`Row`, and more fields) and what a benchmark adds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gatedconv._io import write_atomic
from gatedconv.environment import commit, cpu_info, version, versions
from gatedconv.measure.latency import Spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "GATEDCONV_ISA")

Call = Callable[[], Any]


class ResultFile:
    """The rows of one machine, software and commit; written after every case, continued where the file exists.

    Args:
        path: the file.
        machine: see `machine_header`; other keys may follow.

    Raises:
        ValueError: the file has rows of another machine, software or commit.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"machine": machine, "rows": [], "failures": [], "layers": {}}
        if path.exists():
            self.found = json.loads(path.read_text())
            same = (key for key in machine if key not in ("date", "peak_gflops"))
            different = [key for key in same if self.found["machine"].get(key) != machine[key]]
            if different:
                raise ValueError(f"{path}: has results of another machine or version ({', '.join(different)} differ)")

    def has(self, case: str, batch: int) -> bool:
        """Whether a case has been measured."""
        return any((row["case"], row["batch"]) == (case, batch) for row in self.found["rows"])

    def add(
        self,
        rows: Iterable[Mapping[str, Any]],
        failures: Iterable[Mapping[str, Any]] = (),
        layers: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a case and write the file."""
        self.found["rows"] += rows
        self.found["failures"] += failures
        self.found["layers"].update(layers or {})
        write_result(self.path, self.found)


def write_result(path: Path, found: Mapping[str, Any]) -> None:
    """Write a result file atomically: each key on a line of its own, and each entry of a list or mapping."""
    parts = []
    for key, value in found.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        elif key != "machine" and isinstance(value, dict) and value:
            text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    write_atomic(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def machine_header(threads: int | None = None, gpu: str | None = None) -> dict[str, Any]:
    """Machine, software and commit: of the CPU with some threads, or of a GPU by its name."""
    model = cpu_info("model name") or "unknown"
    limits = {value.lower() for name in _LIMITS if (value := os.environ.get(name))}
    family = "/".join(cpu_info(field) or "?" for field in ("cpu family", "model"))
    return {
        "device": device_name(model, os.cpu_count() or 1, limits) if gpu is None else gpu_name(gpu),
        "cpu": f"{model} (family/model {family})",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "triton": None if gpu is None else version("triton"),
        "cuda": None if gpu is None else torch.version.cuda,
        "versions": versions("onnxruntime", "openvino"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def made_by(machine: Mapping[str, Any]) -> str:
    """Commit and date of a header, for a page."""
    return f"commit `{(machine['commit'] or 'unknown')[:10]}`, {machine['date'][:10]}"


def device_name(model: str, cores: int, limits: Iterable[str] = ()) -> str:
    """A short name such as "epyc-2c", with the instruction sets that the software is limited to: "epyc-2c-avx2"."""
    family = re.search(r"epyc|xeon|ryzen|threadripper|core|apple|graviton|neoverse", model.lower())
    return "-".join([family.group() if family else "cpu", f"{cores}c", *sorted(limits)])


def gpu_name(device: str) -> str:
    """NVIDIA H200 -> h200, NVIDIA GeForce RTX 4090 -> rtx-4090, Tesla T4 -> t4."""
    words = [word for word in re.split(r"[^a-z0-9]+", device.lower()) if word not in ("nvidia", "geforce", "tesla", "")]
    return "-".join(words[:2] if words[:1] in (["rtx"], ["gtx"]) else words[:1]) or "gpu"


class Machine:
    """Times calls on the GPU: CUDA events, CUDA graphs, launches by the profiler, peak memory.

    Args:
        dry: make the same calls on the CPU, once; the times mean nothing.
        rounds: samples of each call.
    """

    WARM_UP = 5
    ROUND_MS = 10.0  # of a sample: long enough that an event's half microsecond does not matter

    def __init__(self, dry: bool = False, rounds: int = 10) -> None:
        self.dry, self.rounds = dry, rounds
        self.device = "cpu" if dry else "cuda"
        self.stands_in = not dry  # whether our compiled kernels run; on a dry machine those of a stand-in
        if not dry:
            torch.backends.cudnn.benchmark = True  # every provider convolves by the fastest algorithm

    def copies(self, make: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        """Inputs to rotate through: as many as exceed twice the L2 cache, so that none is read from it."""
        first = make()
        cache = 0 if self.dry else torch.cuda.get_device_properties(0).L2_cache_size
        count = min(64, 1 + 2 * cache // max(1, first.numel() * first.element_size()))
        return [first, *(make() for _ in range(count - 1))]

    def values(self, calls: Sequence[Call], graph: bool, inner: bool = True) -> dict[str, Any]:
        """Fields of a row for calls that are made in rotation: times, launches and memory of one of them.

        Args:
            calls: the same computation on different inputs.
            graph: capture them in a CUDA graph.
            inner: count launches and memory, which a captured call hides.
        """
        inner = inner and not graph and not (self.dry and self.stands_in)  # an interpreter launches nothing
        launches = self.count_launches(calls[0]) if inner else None
        memory = self.peak_bytes(calls[0]) if inner else None

        def rotate() -> Any:
            results = [call() for call in calls]
            return results[-1]

        times = self.measure(self.captured(rotate) if graph else rotate)
        return {name: ms / len(calls) for name, ms in times.items()} | {"launches": launches, "bytes_peak": memory}

    def measure(self, call: Call) -> dict[str, float]:
        """Milliseconds per call: ``ms_median``, ``ms_min`` and ``ms_iqr`` over samples of many calls each."""
        for _ in range(0 if self.dry else self.WARM_UP):
            call()
        repeats = 1 if self.dry else max(1, min(200, int(self.ROUND_MS / max(self._sample(call, 3), 1e-3))))
        times = Spread.of([self._sample(call, repeats) for _ in range(2 if self.dry else self.rounds)])
        return {"ms_median": times.median, "ms_min": times.least, "ms_iqr": times.iqr}

    def _sample(self, call: Call, repeats: int) -> float:
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

    def host_ms(self, call: Call) -> float:
        """Milliseconds until a call returns, which waits for no GPU: the least of several, each on an idle one."""
        times = []
        for _ in range(1 if self.dry else 20):
            if not self.dry:
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times) * 1e3

    def captured(self, call: Call) -> Call:
        """The call as a CUDA graph; it must not synchronize or depend on fresh input.

        Warm-up and capture share a stream, because autograd binds the accumulation of gradients to the stream of the
        first backward.
        """
        if self.dry:
            return call
        from gatedconv._cuda_graph import capture, on_stream

        stream = torch.cuda.Stream()
        with on_stream(stream):
            for _ in range(3):  # compiles kernels and lets cuDNN choose
                call()
        graph, kept = capture(call, torch.device("cuda"), stream)

        def run() -> Any:
            graph.replay()
            return kept

        return run

    def count_launches(self, call: Call) -> int:
        """Kernels that one call launches, without copies and fills by the driver."""
        call()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not self.dry:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            if not self.dry:
                torch.cuda.synchronize()
        # User annotations are events on the device, too.
        events = (event for event in profile.events() if not getattr(event, "is_user_annotation", False))
        return count_kernels((event.device_type.name, event.name) for event in events)

    def peak_bytes(self, call: Call) -> int:
        """Largest memory of one call beyond what was allocated before it, bytes."""
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
        """`torch.compile`; on a dry machine without a backend."""
        torch._dynamo.reset()
        if self.dry:
            return torch.compile(function, backend="eager", fullgraph=fullgraph)
        return torch.compile(function, mode=mode, fullgraph=fullgraph)


def count_kernels(events: Iterable[tuple[str, str]]) -> int:
    """The number of kernels among (device type, name) pairs."""
    return sum(device == "CUDA" and not name.startswith(("Memcpy", "Memset")) for device, name in events)


@contextlib.contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable for a while; None leaves it."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let float32 convolutions and products use tf32 if ``dtype`` is "tf32", and not otherwise."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialized memory with NaN, so that a kernel that writes nothing cannot pass for a right one."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
