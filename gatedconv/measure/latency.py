"""Latency of networks and of the blocks of a compact one, interleaved, so that a noisy machine disturbs all equally.

In a round each candidate is measured once. Before a measurement the process waits until none of its threads is busy
(the pools of OpenMP and ONNX Runtime spin for some milliseconds after their last call, on cores that the next candidate
needs), and makes a call to warm the caches; then it times single calls. Candidates may be compared round by round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gatedconv.measure.macs import count_macs

Name = TypeVar("Name")

IDLE_STEP_S = 0.002
IDLE_LIMIT_S = 0.1
OVERTIME = 3
MAX_CALLS = 1000
IDLE_SHARE = 0.2  # a process that uses less of one core than this while its main thread sleeps is idle


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and minimum of some figures, in their unit."""

    median: float
    lower: float
    upper: float
    least: float

    @property
    def iqr(self) -> float:
        """Interquartile range: 75th minus 25th percentile."""
        return self.upper - self.lower

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value; quartiles are interpolated between the values."""
        if not values:
            raise ValueError("Spread.of: expected at least one value, got none")
        lower = middle = upper = values[0]
        if len(values) > 1:
            lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, lower, upper, min(values))


class Interleaved(Generic[Name]):
    """The samples of some callables, measured round by round.

    Args:
        candidates: name -> callable without arguments; one call of it is timed.
        sample_ms: minimum duration of the timed calls of a sample, in ms; a slower candidate is called once.
        warmup: calls of each candidate before anything is timed.
        lead_in: untimed calls before each sample.
        wait: whether a sample waits until the threads of other candidates are idle.
        synchronize: called before each reading of the clock, for devices that run asynchronously.

    Attributes:
        samples: name -> median ms of the calls of a sample, one value per round.
        least: name -> ms of the fastest single call.
        calls: name -> timed calls per sample, fewer where they take three times as long as expected.

    Raises:
        ValueError: no candidates, or no warm-up.
    """

    def __init__(
        self,
        candidates: Mapping[Name, Callable[[], object]],
        *,
        sample_ms: float = 30.0,
        warmup: int = 3,
        lead_in: int = 1,
        wait: bool = True,
        synchronize: Callable[[], object] | None = None,
    ) -> None:
        if not candidates:
            raise ValueError("Interleaved: expected at least one candidate, got none")
        if warmup < 1:
            raise ValueError(f"Interleaved: expected at least 1 warm-up call, got {warmup}")
        self.candidates = dict(candidates)
        self.samples: dict[Name, list[float]] = {name: [] for name in candidates}
        self.least: dict[Name, float] = {}
        self.calls: dict[Name, int] = {}
        self._sample_ms, self._lead_in, self._wait, self._synchronize = sample_ms, lead_in, wait, synchronize
        for name, candidate in self.candidates.items():
            # The first calls may compile or allocate: the fastest one determines how many fit in a sample.
            fastest = min(self._call_ms(candidate) for _ in range(warmup))
            self.calls[name] = max(1, min(MAX_CALLS, round(sample_ms / max(fastest, 1e-6))))

    def prepare(self, name: Name) -> None:
        """The untimed part of a sample: wait until idle, then the lead-in calls."""
        if self._wait:
            wait_until_idle()
        for _ in range(self._lead_in):
            self.candidates[name]()

    def sample(self, name: Name) -> None:
        """The timed part: add one sample."""
        candidate, collecting = self.candidates[name], gc.isenabled()
        gc.disable()
        try:
            times = self._times(candidate, self.calls[name])
        finally:
            if collecting:
                gc.enable()
        self.samples[name].append(statistics.median(times))
        self.least[name] = min(*times, self.least.get(name, times[0]))

    def round(self, names: Iterable[Name] | None = None) -> None:
        """One sample of each candidate, or of each of those named."""
        for name in self.candidates if names is None else names:
            self.prepare(name)
            self.sample(name)

    def spread(self, name: Name) -> Spread:
        """The spread of a candidate's ms per call; ``least`` is its fastest call."""
        of_rounds = Spread.of(self.samples[name])
        return Spread(of_rounds.median, of_rounds.lower, of_rounds.upper, self.least[name])

    def ratio(self, name: Name, base: Name) -> Spread:
        """The spread of a candidate's time divided by that of ``base``, round by round."""
        pairs = zip(self.samples[name], self.samples[base], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])

    def _times(self, candidate: Callable[[], object], calls: int) -> list[float]:
        times: list[float] = []
        # Fewer calls where they have become far slower than at the start.
        while not times or (len(times) < calls and sum(times) < OVERTIME * self._sample_ms):
            times.append(self._call_ms(candidate))
        return times

    def _call_ms(self, candidate: Callable[[], object]) -> float:
        if self._synchronize is not None:
            self._synchronize()
        started = time.perf_counter()
        candidate()
        if self._synchronize is not None:
            self._synchronize()
        return (time.perf_counter() - started) * 1000


def wait_until_idle() -> float:
    """Sleep until the threads of this process are idle; returns the seconds that it took."""
    started = time.monotonic()
    while time.monotonic() - started < IDLE_LIMIT_S:
        busy = time.process_time()
        time.sleep(IDLE_STEP_S)
        if time.process_time() - busy < IDLE_SHARE * IDLE_STEP_S:
            break
    return time.monotonic() - started


@torch.inference_mode()
def measure_latency(
    models: Mapping[Name, Callable[[Tensor], object]], example_input: Tensor, *, rounds: int = 21
) -> dict[Name, Spread]:
    """Time several models on one input: round 1 of each, then round 2 of each, and so on.

    Args:
        models: name -> callable; networks must be in eval mode and on the input's device.
        example_input: (N, C, H, W), the batch to run.
        rounds: measurements per model.

    Returns:
        name -> ms of one call.

    Raises:
        ValueError: no models, or no round.
    """
    if rounds < 1:
        raise ValueError(f"measure_latency: rounds must be at least 1, got {rounds}")
    calls = {name: partial(model, example_input) for name, model in models.items()}
    return _spreads(calls, example_input.device, rounds, sample_ms=5.0)


def _spreads(
    calls: Mapping[Name, Callable[[], object]], device: torch.device, rounds: int, **options: Any
) -> dict[Name, Spread]:
    """Time calls on a device; the options are those of `Interleaved`. No sample waits or has calls before it."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    timing = Interleaved(calls, lead_in=0, wait=False, synchronize=synchronize, **options)
    for _ in range(rounds):
        timing.round()
    return {name: timing.spread(name) for name in calls}


@torch.inference_mode()
def block_figures(
    net: nn.Module, masks: Mapping[str, Tensor], example_input: Tensor, *, rounds: int = 9
) -> list[dict[str, Any]]:
    """Size, MACs and time of every gated block of a compact network.

    Args:
        net: the compact network, in eval mode; its blocks have the module paths of the gated network.
        masks: gate path -> bool (num_gates,), the consensus.
        example_input: (1, C, H, W).
        rounds: interleaved measurements of each block; 0 measures no times.

    Returns:
        One dict for each block, in order: `block`, its path; `open` and `channels`, of its channel gate, None
        without one; `runs`, whether its branch exists; `macs` of the block per image; `ms`, the median time of one
        call in PyTorch's eager mode, None where it was not measured.
    """
    paths = dict.fromkeys(gate.rpartition(".")[0] for gate in masks)
    modules = dict(net.named_modules())
    present = {path: modules[path] for path in paths if path in modules}
    inputs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.setdefault(path, arguments[0].clone())

    hooks = [found.register_forward_pre_hook(partial(keep, path)) for path, found in present.items()]
    try:
        net(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    calls = {path: partial(present[path], x) for path, x in inputs.items()}
    times = _spreads(calls, example_input.device, rounds, sample_ms=1.0) if rounds and calls else {}
    return [_figures(path, masks, present.get(path), inputs.get(path), times.get(path)) for path in paths]


def _figures(
    path: str, masks: Mapping[str, Tensor], block: nn.Module | None, x: Tensor | None, spread: Spread | None
) -> dict[str, Any]:
    of_block = [mask for gate, mask in masks.items() if gate.rpartition(".")[0] == path]
    channels = next((mask for mask in of_block if mask.numel() > 1), None)
    closed = any(not mask.any() for mask in of_block)
    return {
        "block": path,
        "open": None if channels is None else 0 if closed else int(channels.sum()),
        "channels": None if channels is None else channels.numel(),
        "runs": not closed,
        "macs": 0 if block is None or x is None or isinstance(block, nn.Identity) else count_macs(block, x),
        "ms": None if spread is None else round(spread.median, 5),
    }
