"""Energy in joules, from the counters of the hardware: NVML on NVIDIA GPUs, RAPL on CPUs.

NVML is read through NVIDIA's own package (``pip install 'gatedconv[energy]'``), RAPL through the kernel's powercap
files. Where nothing can be read the result is None with a reason, never 0. A counter is of a whole device and includes
all work on it.
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


class EnergyCounter(Protocol):
    """The energy that a device has consumed; it only grows, and restarts at 0 after ``span`` joules (None: never)."""

    name: str
    span: float | None

    def read(self) -> float:
        """Joules; OSError, ValueError or RuntimeError where it cannot be read."""
        ...


class RaplCounter:
    """A package or memory zone of powercap; OSError or ValueError where it cannot be read."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self.name = f"CPU {(zone / 'name').read_text().strip()} (RAPL)"
        self.span: float | None = int((zone / "max_energy_range_uj").read_text()) * 1e-6
        self.read()

    def read(self) -> float:
        """Joules."""
        return int(self._file.read_text()) * 1e-6


class NvmlCounter:
    """A GPU of NVML, found by its UUID, because CUDA and NVML may number GPUs differently.

    Raises:
        ImportError: the package nvidia-ml-py is not installed.
        OSError: NVML, or this GPU's counter (Volta and later), is not available.
    """

    span: float | None = None

    def __init__(self, device: torch.device, nvml: Any = None) -> None:
        self._nvml = nvml = nvml or importlib.import_module("pynvml")
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
    """Joules of some counters since `start`.

    Args:
        device: of the work.
        host: also count this machine's CPUs; one process per machine should.
        counters: what to read; None for those of this machine.
        shared: other work runs on the device, so that its counters cannot be used.

    Attributes:
        source: names of the counted devices; "" without any.
        reason: why the energy since `start` is unknown; "" while it is known.
        elsewhere: whether another process counts the energy of this one.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        host: bool = True,
        counters: Sequence[EnergyCounter] | None = None,
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
        """Count from 0, and forget earlier failures."""
        self.reason = self._failed = self._absent
        self._totals = [0.0] * len(self._counters)
        self._last = self._read()

    def poll(self) -> None:
        """Read the counters, often enough that none restarts twice unseen; RAPL's may restart within minutes."""
        now = self._read()
        for number, (counter, before, after) in enumerate(zip(self._counters, self._last, now, strict=False)):
            used = after - before
            self._totals[number] += used + counter.span if used < 0 and counter.span is not None else used
        self._last = now

    def joules(self) -> float | None:
        """Joules since `start`; None where a counter fails or does not move, with the `reason`.

        A sum over some of the counters would pass for the total. A counter that does not move may still do so later; a
        failed one stays unknown until the next `start`.
        """
        self.poll()
        still = [counter.name for counter, total in zip(self._counters, self._totals, strict=True) if total <= 0]
        self.reason = self._failed or (f"{', '.join(still)}: the counter does not move" if still else "")
        return None if self.reason else sum(self._totals)

    def _read(self) -> list[float]:
        if self._failed:
            return []
        try:
            return [counter.read() for counter in self._counters]
        except (OSError, ValueError, RuntimeError) as error:
            self.reason = self._failed = _message(error)
            return []


@torch.inference_mode()
def energy_per_call(
    call: Callable[[], object],
    meter: EnergyMeter,
    *,
    seconds: float = 1.0,
    synchronize: Callable[[], object] | None = None,
) -> float | None:
    """Joules of one call, averaged over as many as fill a time; None where the meter has a `reason`.

    Args:
        call: the work.
        meter: started here.
        seconds: minimum time, for counters that move in steps of milliseconds.
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


def find_counters(
    device: torch.device, *, host: bool = True, powercap: Path = POWERCAP
) -> tuple[list[EnergyCounter], str]:
    """The counters for work on a device; without any, the reason.

    A GPU's own counter is required, and all packages of a CPU: a part would pass for the total.

    Args:
        device: of the work.
        host: whether this machine's CPUs count.
        powercap: the kernel's folder.
    """
    found: list[EnergyCounter] = []
    reasons: list[str] = []
    if device.type == "cuda":
        _add(found, reasons, partial(NvmlCounter, device))
        if not found:
            return [], reasons[0]
    if host:
        zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if _counts(zone)) if powercap.is_dir() else []
        for zone in zones:
            _add(found, reasons, partial(RaplCounter, zone))
        if not zones:
            reasons.append(f"no RAPL zones in {powercap}")
    if device.type == "cpu" and reasons:
        return [], reasons[0]
    return found, "" if found else "; ".join(reasons) or "another process counts this machine"


def _add(found: list[EnergyCounter], reasons: list[str], make: Callable[[], EnergyCounter]) -> None:
    try:
        found.append(make())
    except ImportError:
        reasons.append("NVML: needs pip install 'gatedconv[energy]'")
    except (OSError, ValueError, RuntimeError) as error:
        reasons.append(_message(error))


def _counts(zone: Path) -> bool:
    """Packages and memory; other zones are inside (core) or around (psys) them. Memory without a meter stays at 0."""
    try:
        name = (zone / "name").read_text()
    except OSError:
        return False
    if name.startswith("package"):
        return True
    try:
        return name.startswith("dram") and (zone / "energy_uj").read_text().strip() != "0"
    except (OSError, UnicodeDecodeError):
        return True  # `RaplCounter` reports why


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
