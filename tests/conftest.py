import ctypes
import getpass
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.utils.data._utils import signal_handling

from gatedconv import environment, models
from gatedconv.models import BUILDERS, ResNet

# Read once by the native library: its workspaces begin as NaN.
os.environ.setdefault("GATEDCONV_POISON", "1")

# Inductor's cache does not tell instruction sets apart: its code for AVX-512, compiled for AVX2, leaves out elements.
_CACHE = f"torchinductor-{getpass.getuser()}-{torch.backends.cpu.get_cpu_capability().lower()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / _CACHE))

# The same examples at every run, kept nowhere; HYPOTHESIS_PROFILE=search draws others and keeps what fails.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "GATEDCONV_ISA", "GATEDCONV_NATIVE")


def pytest_configure() -> None:
    """A worker of pytest-xdist, and what its tests start, keeps to one core."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header() -> list[str]:
    """What results may depend on."""
    found = environment.collect()
    isa = torch.ops.gatedconv.plan_isa() if found["native.cpu.path"] else "none"
    limits = " ".join(f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ)
    return [
        f"torch {found['packages.torch']}, triton {found['packages.triton']}, "
        f"GPU: {', '.join(found['cuda.devices']) or 'none'}",
        f"CPU: {found['cpu.model']}, {torch.backends.cpu.get_cpu_capability()}, {' '.join(found['cpu.features'])}, "
        f"{found['cpu.threads']} of {found['cpu.cores']} cores",
        f"native library: {found['native.cpu.source']}, {isa} {limits}".rstrip(),
    ]


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """PyTorch fills what torch.empty returns, in C++ too, while deterministic algorithms are asked for."""
    if request.node.get_closest_marker("gpu"):  # there it would also change the algorithms
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for ResNet-20 gets a network with one block a stage, which can be read back."""
    builder = partial(ResNet, 8)
    monkeypatch.setattr(models, "resnet20", builder)
    monkeypatch.setitem(BUILDERS, "resnet8", builder)


class _Stack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def _signals_on_the_stack_that_is_there() -> None:
    """No alternate stack: OpenVINO unmaps the one that it has put there, and the next signal would crash."""
    disable = 2  # SS_DISABLE
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(None, disable, 0)), None)
