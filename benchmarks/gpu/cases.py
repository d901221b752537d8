"""Every case of `python -m benchmarks.gpu`, the most informative first."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import engine_timings, gate_timings, parity, training_timings
from benchmarks.harness import ROOT, Machine
from benchmarks.roofline import measured_rates
from gatedconv import _native
from gatedconv.bench.comparison import Row

FIRST_S = 40.0
STAND_IN = "tests.ptx.stand_in"  # where it exists, its `installed()` runs kernels without a GPU in a dry walk
SANITIZED = ("tests/kernels/gpu/test_sanitized.py", "tests/cuda/gpu/test_sanitized.py")
TESTS = ("tests/kernels/gpu", "tests/cuda/gpu")


Part = Callable[[Machine], Sequence[Row]]


@dataclass(frozen=True)
class Case:
    """Something to run in a process of its own.

    Attributes:
        name: unique; also the name of its log.
        parts: each measures something and returns rows; an exception becomes a failed row, and the next part runs.
        seconds: after which the process is killed.
        first: whether the stage ``first`` has it.
        dry: whether a dry walk has it: one case, the smallest, of each kind.
        alone: whether it measures times, so that nothing else may run at the same time.
    """

    name: str
    parts: tuple[Part, ...]
    seconds: float = FIRST_S
    first: bool = True
    dry: bool = False
    alone: bool = True


def all_cases() -> list[Case]:
    """Every case in order; those of ``first`` first."""
    found = [*_cases()]
    return sorted(found, key=lambda case: not case.first)


def _cases() -> Iterator[Case]:
    # Compiling the library, where it was not built beforehand, takes minutes.
    yield Case("build", (build,), 300.0, dry=True)
    yield Case("ceilings", (ceilings,), dry=True)
    for format_ in ("float16", "tf32", "bfloat16", "float32"):
        yield _check(f"conv-{format_}", partial(parity.conv_rows, dtype=format_), dry=format_ == "float16")
    for ranks in (1, 2, 4, 8):
        yield _check(f"resident-x{ranks}", partial(parity.resident_rows, ranks=ranks), dry=ranks == 1)
    yield _check("gate", parity.gate_rows)
    yield _check("block", parity.gated_residual_rows)
    for kind, channels, size in (("layer", 16, 32), ("channel", 64, 8)):
        yield Case(f"gate-{kind}", (_gate(kind, channels, size),), dry=kind == "layer")
    yield Case("gated_scale", (partial(gate_timings.gated_scale_rows, channels=64, size=8),), dry=True)
    for batch in (32, 256, 1):
        yield Case(f"engine-{batch}", _network("resnet56", batch, engine_timings.EAGER), 90.0, dry=batch == 1)
    first, *others = (partial(engine_timings.layer_rows, layer=layer) for layer in engine_timings.LAYERS)
    yield Case("layer", (first,), dry=True)
    yield Case("layer-others", tuple(others), 90.0)
    yield Case("step", _step(56, "channel", training_timings.EAGER), 90.0, dry=True)
    yield from _compiling()
    for tool in ("memcheck", "racecheck"):
        yield Case(f"sanitizer-{tool}", (partial(sanitized, tool=tool),), 120.0, dry=tool == "memcheck")
    yield from _more()


def _check(name: str, run: Part, dry: bool = True) -> Case:
    return Case(f"parity-{name}", (run,), dry=dry, alone=False)


def _gate(kind: str, channels: int, size: int, providers: tuple[str, ...] = gate_timings.EAGER) -> Part:
    return partial(gate_timings.gate_rows, kind=kind, channels=channels, size=size, providers=providers)


def _network(model: str, batch: int, providers: Sequence[str]) -> tuple[Part, ...]:
    rows = partial(engine_timings.network_rows, model=model, variant="mid-50", batch=batch, dtype="float16")
    return tuple(partial(rows, provider=provider) for provider in providers)


def _step(depth: int, gate: str, providers: Sequence[str]) -> tuple[Part, ...]:
    rows = partial(training_timings.step_rows, depth=depth, gate=gate, batch=256)
    return tuple(partial(rows, provider=provider) for provider in providers)


def _compiling() -> Iterator[Case]:
    """Cases that compile: they take longest, so they come last."""
    for kind, channels, size in (("layer", 16, 32), ("channel", 64, 8)):
        yield Case(f"gate-{kind}-compile", (_gate(kind, channels, size, gate_timings.COMPILED),), dry=kind == "layer")
    scale = partial(gate_timings.gated_scale_rows, channels=64, size=8, providers=gate_timings.COMPILED)
    yield Case("gated_scale-compile", (scale,), dry=True)
    yield Case("engine-32-compile", _network("resnet56", 32, [engine_timings.COMPILED]), dry=True)
    yield Case("step-compile", _step(56, "channel", [training_timings.COMPILED]), dry=True)


def _more() -> Iterator[Case]:
    """Beyond ``first``: the tests on the GPU, other networks, types and shapes; compiling with more time."""
    slow: dict[str, Any] = {"seconds": 240.0, "first": False}
    yield Case("tests", (run_tests,), 480.0, first=False)
    for case in _compiling():
        yield replace(case, name=f"{case.name}-slow", **slow, dry=False)
    for kind, channels, size in (("channel", 16, 32), ("channel-flat", 64, 8), ("layer", 1024, 14)):
        yield Case(f"gate-{kind}-{channels}", (_gate(kind, channels, size),), **slow)
    for model in ("resnet110", "resnet18", "resnet50"):
        for batch in (32, 256, 1):
            yield Case(
                f"engine-{model}-{batch}",
                _network(model, batch, (*engine_timings.EAGER, engine_timings.COMPILED)),
                **slow,
            )
    for depth, kind in ((56, "layer"), (110, "channel")):
        yield Case(f"step-{depth}-{kind}", _step(depth, kind, training_timings.EAGER), **slow)


def build(machine: Machine) -> list[Row]:
    """Load the CUDA library, or compile it where it was not built beforehand; versions are in the header."""
    if machine.dry:
        return [Row("build", "cuda library", 0, "", "gatedconv", note="not run: dry")]
    library = _native.load("cuda")
    if not library.available:
        raise RuntimeError(f"no CUDA library: {library.reason}")
    return [Row("build", "cuda library", 0, "", "gatedconv", note=library.source)]


def ceilings(machine: Machine) -> list[Row]:
    """The best rates of this device: bytes of a large copy, FLOP of large products."""
    rows = []
    for dtype in (torch.float16, torch.float32):
        rates = measured_rates(torch.device(machine.device), dtype, 64 if machine.dry else 0)
        note = f"{rates.flop_per_ms / 1e9:.1f} TFLOP/s, {rates.bytes_per_ms / 1e6:.0f} GB/s"
        name = "float16" if dtype == torch.float16 else "tf32"
        rows.append(Row("ceiling", "product or 3x3 convolution; copy", 0, name, "measured", note=note))
    return rows


def stand_in(machine: Machine) -> AbstractContextManager[Any]:
    """Stand in for the device in a dry walk: the interpreter of compiled kernels, or nothing (the references run)."""
    if machine.dry and _exists(STAND_IN):
        context: AbstractContextManager[Any] = importlib.import_module(STAND_IN).installed()
        return context
    return nullcontext()


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def pytest_command(*arguments: str) -> list[str]:
    """Pytest without the project's configuration, so that it needs no plugin."""
    plain = ["-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *plain, *arguments]


def run_tests(machine: Machine) -> list[Row]:
    """The tests on the GPU."""
    code = subprocess.run(pytest_command("--maxfail=5", *TESTS), cwd=ROOT).returncode
    note = "passed" if code == 0 else f"failed: exit code {code}"
    return [Row("tests", " ".join(TESTS), 0, "", "gatedconv", note=note)]


def sanitized(machine: Machine, tool: str) -> list[Row]:
    """Small tests of every kernel under a tool of compute-sanitizer, of the CUDA library last."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin", Path("/usr/local/cuda/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, homes)])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    row = Row("sanitizer", tool, 0, "", "gatedconv", note="not run: compute-sanitizer is not installed")
    if sanitizer is None or machine.dry:
        return [row if sanitizer is None else replace(row, note="not run: dry")]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest_command("-x", *SANITIZED)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return [replace(row, note="passed" if code == 0 else f"failed: exit code {code}")]
