"""The footprint of a network where it runs: file, installed package, memory, time to the first result.

Every figure is of a process of its own, which imports one runtime, loads the network and runs it. Runtimes are
interleaved, and the least of the rounds is kept: what a busy machine adds is no property of a runtime.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatedconv._io import first_line
from gatedconv.bench import mobile
from gatedconv.bench.comparison import WRONG_ABOVE
from gatedconv.convert.verify import distance
from gatedconv.deploy import export, save

# The process: NumPy is imported before, as in any program that has an image.
_PROCESS = """
from __future__ import annotations
import json, sys, time
import numpy as np
path, shape, threads, calls = json.loads(sys.argv[1])
x = np.random.default_rng(0).standard_normal(shape, np.float32)
{source}
begin = time.perf_counter()
import {imports}
imported = time.perf_counter()
run = {session}(path, x, threads)
y = np.asarray(run())
answered = time.perf_counter()
with open("/proc/self/status") as status:  # ru_maxrss would be at least the memory of the process that started this one
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
least = float("inf")
for _ in range(calls):
    start = time.perf_counter()
    run()
    least = min(least, time.perf_counter() - start)
times = [1e3 * (imported - begin), 1e3 * (answered - begin), 1e3 * least]
print(json.dumps([*times, peak / 1024, y.ravel()[:64].tolist()]))
"""


@dataclass(frozen=True)
class Runtime:
    """A way to run a network.

    Attributes:
        name: as shown.
        package: the distribution that is installed for it.
        suffix: of its file.
        imports: the modules to import.
        session: (path, x, threads) -> what computes the answer for x; its source runs in the process.
    """

    name: str
    package: str
    suffix: str
    imports: str
    session: Callable[[str, np.ndarray, int], Callable[[], np.ndarray]]


def _runtime_session(path: str, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    import gatedconv_runtime

    network = gatedconv_runtime.load(path, threads=threads)
    return lambda: network(x)


def _ort_session(path: str, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {session.get_inputs()[0].name: x})[0]


def _engine_session(path: str, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from gatedconv.deploy import load
    from gatedconv.engine import Engine

    torch.set_num_threads(threads)
    engine = Engine(load(path).eval(), torch.from_numpy(x))
    return lambda: engine(torch.from_numpy(x)).numpy()


RUNTIMES = (
    Runtime("gatedconv-runtime", "gatedconv-runtime", ".plan", "gatedconv_runtime", _runtime_session),
    Runtime("ONNX Runtime", "onnxruntime", ".onnx", "onnxruntime", _ort_session),
    Runtime("MNN", "MNN", ".mnn", "MNN", mobile.mnn_session),
    Runtime("ncnn", "ncnn", ".ncnn.param", "ncnn", mobile.ncnn_session),
    Runtime("gatedconv.Engine", "torch", ".safetensors", "torch, gatedconv", _engine_session),
)


@dataclass(frozen=True)
class Footprint:
    """One runtime's figures for one network: bytes, MiB and ms, None where not measured.

    Attributes:
        runtime: its name.
        version: of the package.
        file: bytes of the network's file.
        package: bytes of the installed package without what it depends on.
        import_ms: time to import the runtime, beyond NumPy.
        first_ms: time from before that import to the first result.
        call_ms: fastest later call.
        peak_mib: largest resident memory of the process up to the first result.
        note: why nothing was measured.
    """

    runtime: str
    version: str = ""
    file: int | None = None
    package: int | None = None
    import_ms: float | None = None
    first_ms: float | None = None
    call_ms: float | None = None
    peak_mib: float | None = None
    note: str = ""


def measure_footprints(
    network: nn.Module, x: Tensor, folder: Path, *, rounds: int = 5, calls: int = 100, threads: int = 1
) -> list[Footprint]:
    """Export a network for every runtime and measure each in processes of its own.

    Args:
        network: in eval mode, one that `gatedconv.save` takes.
        x: (N, C, H, W), the size of the calls.
        folder: for the files.
        rounds: processes of each runtime.
        calls: timed calls in a process, after the first.
        threads: of each runtime.
    """
    ready: list[tuple[Runtime, Path]] = []
    found: dict[str, Footprint] = {}
    for runtime in RUNTIMES:
        try:
            version = importlib.metadata.version(runtime.package)
            path = folder / f"network{runtime.suffix}"
            _write(network, x, path)
            found[runtime.name] = Footprint(runtime.name, version, _file_bytes(path), _installed_bytes(runtime.package))
            ready.append((runtime, path))
        except (ImportError, ValueError, TypeError, OSError, RuntimeError) as error:
            found[runtime.name] = Footprint(runtime.name, note=first_line(error))
    samples: dict[str, list[Sequence[float]]] = {runtime.name: [] for runtime, _ in ready}
    with torch.no_grad():
        expected = network(_input(x.shape)).flatten()[:64]
    for _ in range(rounds):
        for runtime, path in ready:
            *figures, output = _run_once(runtime, path, list(x.shape), threads, calls)
            if distance(torch.tensor(output), expected) > WRONG_ABOVE:
                raise RuntimeError(f"{runtime.name} computes another output than the model")
            samples[runtime.name].append(figures)
    for name, figures in samples.items():
        least = [min(column) for column in zip(*figures, strict=True)]
        values = dict(zip(("import_ms", "first_ms", "call_ms", "peak_mib"), least, strict=True))
        found[name] = Footprint(**{**asdict(found[name]), **values})
    return list(found.values())


def _input(shape: Sequence[int]) -> Tensor:
    """The input of the processes."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(shape), np.float32))


def _write(network: nn.Module, x: Tensor, path: Path) -> None:
    if path.suffix == ".safetensors":
        save(network, path)
    elif path.suffix == ".mnn":
        mobile.mnn_file(network, x, path.parent)
    elif path.suffix == ".param":
        mobile.ncnn_files(network, x, path.parent)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(network, path, x, "plan" if path.suffix == ".plan" else "onnx")


def _file_bytes(path: Path) -> int:
    """The size of a network's file and of its weights, where a runtime keeps them in another one."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def _installed_bytes(package: str) -> int | None:
    files = importlib.metadata.files(package) or []
    sizes = [path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file()]
    return sum(sizes) if sizes else None


def _run_once(runtime: Runtime, path: Path, shape: list[int], threads: int, calls: int) -> list[Any]:
    source = inspect.getsource(runtime.session)
    program = _PROCESS.format(imports=runtime.imports, source=source, session=runtime.session.__name__)
    arguments = json.dumps([str(path), shape, threads, calls])
    command = [sys.executable, "-W", "ignore", "-c", program, arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{runtime.name} failed: {done.stderr.strip()[-500:]}")
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found
