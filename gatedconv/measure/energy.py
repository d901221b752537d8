"""Joules, from the counters that the hardware keeps: NVML's on NVIDIA GPUs, RAPL's on CPUs.

NVML is read through NVIDIA's own package (``pip install 'gatedconv[energy]'``), RAPL through the kernel's powercap
files. Where nothing can be read the answer is None with a reason, never 0. A counter is of a whole device: other
work on it counts too.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
SHARED = "other work ran on the device"


class Counter(Protocol):
    """Energy that a device has taken since some moment, which only grows, but for starting over at ``span``.

    Attributes:
        name: of the device, for people.
        span: joules after which it starts over at 0; None if never.
    """

    name: str
    span: float | None

    def read(self) -> float:
        """Joules; OSError or RuntimeError where it cannot be read."""
        ...


class RaplCounter:
    """A package or memory zone of powercap.

    Raises:
        OSError: the zone cannot be read.
        ValueError: it holds no numbers.
    """

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self.name = f"CPU {(zone / 'name').read_text().strip()} (RAPL)"
        self.span: float | None = int((zone / "max_energy_range_uj").read_text()) * 1e-6
        self.read()

    def read(self) -> float:
        """Joules."""
        return int(self._file.read_text()) * 1e-6


class NvmlCounter:
    """A GPU of NVML, found by the identity that CUDA gives it: the two may number GPUs differently.

    Raises:
        ImportError: the package nvidia-ml-py is not installed.
        OSError: NVML, or this GPU's counter (Volta and later), is not there.
    """

    span: float | None = None

    def __init__(self, device: torch.device, nvml: Any = None) -> None:
        nvml = nvml or importlib.import_module("pynvml")
        self._nvml = nvml
        index = torch.cuda.current_device() if device.index is None else device.index
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode())
        except nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None
        self.name = f"GPU {index} (NVML)"
        self.read()

    def read(self) -> float:
        """Joules."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None


class EnergyMeter:
    """Joules of what counters watch, from `start` on.

    Args:
        device: that the work runs on.
        host: also count this machine's CPUs; one process per machine should.
        counters: what to read; None for what this machine has.
        shared: other work runs on the device: counters of whole devices tell nothing of this one.

    Attributes:
        source: the devices that are counted, for people; "" where none is.
        reason: why nothing can be told of the time since `start`; "" while something can.
        elsewhere: whether another process counts all that this one uses.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        host: bool = True,
        counters: Sequence[Counter] | None = None,
        shared: bool = False,
    ) -> None:
        reason = SHARED if shared else ""
        if shared:
            counters = []
        elif counters is None:
            counters, reason = find_counters(device, host=host)
        self._counters = list(counters)
        self.source = ", ".join(counter.name for counter in self._counters)
        self.elsewhere = device.type == "cpu" and not host
        self.reason = self._failed = self._absent = reason or ("" if self._counters else "no energy counter")
        self._last: list[float] = []
        self._totals = [0.0] * len(self._counters)

    def start(self) -> None:
        """Begin to count, at 0; what went wrong before does not matter any more."""
        self.reason = self._failed = self._absent
        self._totals = [0.0] * len(self._counters)
        self._last = self._read()

    def poll(self) -> None:
        """Read the counters, so that none can start over twice unseen; RAPL's may do so within minutes."""
        now = self._read()
        for number, (counter, before, after) in enumerate(zip(self._counters, self._last, now, strict=False)):
            used = after - before
            self._totals[number] += used + counter.span if used < 0 and counter.span is not None else used
        self._last = now

    def joules(self) -> float | None:
        """Joules since `start`; None where one of the counters does not tell, which `reason` explains."""
        self.poll()
        still = [counter.name for counter, total in zip(self._counters, self._totals, strict=True) if total <= 0]
        # Of a part the rest would pass for the whole. What stands still may move yet; what failed stays unknown.
        self.reason = self._failed or (f"{', '.join(still)}: the counter stands still" if still else "")
        return None if self.reason else sum(self._totals)

    def _read(self) -> list[float]:
        if self._failed:
            return []
        try:
            return [counter.read() for counter in self._counters]
        except (OSError, ValueError, RuntimeError) as error:
            self.reason = self._failed = _told(error)
            return []


@torch.inference_mode()
def energy_per_call(
    call: Callable[[], object],
    meter: EnergyMeter,
    *,
    seconds: float = 1.0,
    synchronize: Callable[[], object] | None = None,
) -> float | None:
    """Joules of one call, from as many of them as fill a time; None where the meter cannot tell.

    Args:
        call: the work.
        meter: started here; `reason` says why it cannot tell.
        seconds: at least so long, for counters that move in steps of milliseconds.
        synchronize: waits for the device.
    """
    if meter.reason:
        return None
    wait = synchronize or (lambda: None)
    call()
    wait()
    meter.start()
    began, calls = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        call()
        wait()
        calls += 1
    joules = meter.joules()
    return None if joules is None else joules / calls


def find_counters(device: torch.device, *, host: bool = True, powercap: Path = POWERCAP) -> tuple[list[Counter], str]:
    """The counters that can be read for work on a device; and, where there are none, why.

    Args:
        device: a GPU's own counter is needed; a CPU's are this machine's.
        host: whether this machine's CPUs count.
        powercap: the kernel's folder.
    """
    found: list[Counter] = []
    reasons: list[str] = []
    if device.type == "cuda":
        _add(found, reasons, lambda: NvmlCounter(device))
        if not found:
            return [], reasons[0]  # the CPU alone would pass for the whole
    if host:
        zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if _counts(zone)) if powercap.is_dir() else []
        for zone in zones:
            _add(found, reasons, partial(RaplCounter, zone))
        if not zones:
            reasons.append(f"no RAPL zones in {powercap}")
    if device.type == "cpu" and reasons:
        return [], reasons[0]  # a part of the packages would pass for all
    return found, "" if found else "; ".join(reasons) or "another process counts this machine"


def _add(found: list[Counter], reasons: list[str], make: Callable[[], Counter]) -> None:
    try:
        found.append(make())
    except ImportError:
        reasons.append("NVML: needs pip install 'gatedconv[energy]'")
    except (OSError, ValueError, RuntimeError) as error:
        reasons.append(_told(error))


def _counts(zone: Path) -> bool:
    """Packages and memory: what else there is lies within them (cores) or around them (psys)."""
    try:
        name = (zone / "name").read_text()
    except OSError:
        return False
    return name.startswith("package") or (name.startswith("dram") and not _never_moved(zone))


def _never_moved(zone: Path) -> bool:
    """Whether a counter stands at 0, as that of memory does where the board has no meter for it."""
    try:
        return (zone / "energy_uj").read_text().strip() == "0"
    except (OSError, UnicodeDecodeError):
        return False  # `RaplCounter` tells why


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
