"""Runtimes of networks on the CPU: our engine and its alternatives, each in its best settings.

A `Setting` prepares a network for one batch and returns a callable without arguments that computes the output. ONNX
files and AOTInductor packages go to a folder, which a second run reuses.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.bench import mobile, quantizers
from gatedconv.bench.exported import Run, made_once, onnx_file
from gatedconv.engine import Engine
from gatedconv.ops.plan import plan_isa

OURS = "gatedconv"
UNLIMITED_ISA = "on every instruction set of the machine"


@dataclass(frozen=True)
class Setting:
    """A runtime and how it is set up.

    Attributes:
        provider: the runtime, as in result rows.
        name: of the set-up.
        prepare: (network in eval mode, input (N, C, H, W) float32, folder for files, threads) -> run.
        needs: required packages.
        split: whether the batch is split in two, so that a batch of one cannot be run.
        dtype: what it computes in.
        extra: of the package, with which the required packages are installed.
    """

    provider: str
    name: str
    prepare: Callable[[nn.Module, Tensor, Path, int], Run]
    needs: tuple[str, ...] = ()
    split: bool = False
    dtype: str = "float32"
    extra: str = "bench"

    @property
    def label(self) -> str:
        """The name, marked where the other runtimes are limited to an older instruction set and this one cannot be."""
        unlimited = self.provider == "onnxruntime" and bool(os.environ.get("ONEDNN_MAX_CPU_ISA"))
        return f"{self.name}, {UNLIMITED_ISA}" if unlimited else self.name

    @property
    def missing(self) -> str | None:
        """Why this setting cannot be tried, None if it can."""
        lacking = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"{', '.join(lacking)} not installed (pip install 'gatedconv[{self.extra}]')" if lacking else None


def _engine(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    engine = Engine(network, x)
    return lambda: engine(x)


def _engine_bf16(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    if plan_isa(bf16=True) == "emulated":
        raise RuntimeError("this CPU has no instructions for bfloat16")
    engine = Engine(network, x, dtype=torch.bfloat16)
    return lambda: engine(x)


def _eager(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    return lambda: network(x)


def _eager_folded(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    from torch.fx.experimental.optimization import fuse

    folded, x = _channels_last(fuse(copy.deepcopy(network)), x)
    return lambda: folded(x)


def _eager_channels_last(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    network, x = _channels_last(network, x)
    return lambda: network(x)


def _compiled(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    # max-autotune has no other convolution than oneDNN's on a CPU.
    network, x = _channels_last(network, x)
    compiled = torch.compile(network, dynamic=False, options={"freezing": True})
    with torch.inference_mode():  # in the mode of the later calls: compiled code is for one mode
        compiled(x)
    return lambda: compiled(x)


def _aoti(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    network, x = _channels_last(network, x)
    isa = torch.backends.cpu.get_cpu_capability().lower()
    path = folder / f"aoti-{isa}-{threads}t-batch{len(x)}.pt2"  # all three are compiled in

    def compile_to(part: Path) -> None:
        program = torch.export.export(network, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(part), inductor_configs={"freezing": True})

    made_once(path, compile_to)
    runner = torch._inductor.aoti_load_package(str(path))
    return lambda: runner(x)


def _ort_session(path: Path, batch: int, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_free_dimension_override_by_name("batch", batch)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _ort_run(session: Any, x: Tensor) -> Run:
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _ort(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    return _ort_run(_ort_session(onnx_file(network, x, folder), len(x), threads), x)


def _ort_int8(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    source = onnx_file(network, x, folder)
    images = quantizers.calibration_images(x)
    path = made_once(folder / "onnxruntime-int8.onnx", lambda part: quantizers.onnxruntime_int8(source, part, images))
    return _ort_run(_ort_session(path, len(x), threads), x)


def _ort_split(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    """Two sessions of half the threads, each on half the batch."""
    path, halves = onnx_file(network, x, folder), _halves(x)
    sessions = [_ort_session(path, len(half), max(1, threads // 2)) for half in halves]
    feeds = [{sessions[0].get_inputs()[0].name: half.numpy()} for half in halves]
    other = ThreadPoolExecutor(1)

    def run() -> Tensor:
        second = other.submit(sessions[1].run, None, feeds[1])
        first = sessions[0].run(None, feeds[0])[0]
        return torch.cat([torch.from_numpy(first), torch.from_numpy(second.result()[0])])

    return run


def _openvino_model(path: Path, shape: Sequence[int], threads: int, **properties: Any) -> Any:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(shape))
    # Its default is bfloat16 where the CPU supports it.
    common = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    wanted = {name: value for name, value in {**common, **properties}.items() if value is not None}
    return core.compile_model(model, "CPU", wanted)


def _openvino_run(compiled: Any, x: Tensor) -> Run:
    request = compiled.create_infer_request()
    feed = {0: x.numpy()}
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])


def _openvino(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    path = onnx_file(network, x, folder)
    return _openvino_run(_openvino_model(path, x.shape, threads, PERFORMANCE_HINT="LATENCY"), x)


def _openvino_default(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    path = onnx_file(network, x, folder)
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": None}
    compiled = _openvino_model(path, x.shape, threads, **properties)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision != "bf16":
        raise RuntimeError(f"its default precision on this CPU is {precision}")
    return _openvino_run(compiled, x)


def _openvino_int8(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    source = onnx_file(network, x, folder)
    images = quantizers.calibration_images(x)
    path = folder / "openvino-int8.xml"
    made_once(path, lambda part: quantizers.openvino_int8(source, part, images), ".bin")
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": None}
    return _openvino_run(_openvino_model(path, x.shape, threads, **properties), x)


def _openvino_split(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
    """Two streams, each on half the batch at the same time."""
    halves = _halves(x)
    compiled = _openvino_model(
        onnx_file(network, x, folder), halves[0].shape, threads, PERFORMANCE_HINT="THROUGHPUT", NUM_STREAMS=2
    )
    requests = [compiled.create_infer_request() for _ in halves]
    feeds = [{0: half.numpy()} for half in halves]

    def run() -> Tensor:
        for request, feed in zip(requests, feeds, strict=True):
            request.start_async(feed, share_inputs=True)
        for request in requests:
            request.wait()
        return torch.cat([torch.from_numpy(request.get_output_tensor(0).data) for request in requests])

    return run


SETTINGS: tuple[Setting, ...] = (
    Setting(OURS, "Engine", _engine),
    Setting("eager", "NCHW", _eager),
    Setting("eager", "channels_last", _eager_channels_last),
    Setting("eager", "BN folded, channels_last", _eager_folded),
    Setting("compile", "freezing, channels_last", _compiled),
    Setting("compile", "AOTInductor, freezing, channels_last", _aoti),
    Setting("onnxruntime", "all optimizations", _ort, ("onnx", "onnxscript", "onnxruntime")),
    Setting("onnxruntime", "two sessions", _ort_split, ("onnx", "onnxscript", "onnxruntime"), split=True),
    Setting("openvino", "latency", _openvino, ("onnx", "onnxscript", "openvino")),
    Setting("openvino", "two streams", _openvino_split, ("onnx", "onnxscript", "openvino"), split=True),
    Setting("mnn", "high precision", mobile.mnn, ("onnx", "onnxscript", "MNN"), extra="peers"),
    Setting("ncnn", "float32, image by image", mobile.ncnn, ("ncnn", "pnnx"), extra="peers"),
    Setting("litert", "XNNPACK", mobile.litert, ("ai_edge_litert", "litert_torch"), extra="litert"),
)
"""Settings in float32."""
REDUCED: tuple[Setting, ...] = (
    Setting(OURS, "Engine, bf16", _engine_bf16, dtype="bfloat16"),
    Setting("onnxruntime", "int8, QDQ", _ort_int8, ("onnx", "onnxscript", "onnxruntime"), dtype="int8"),
    Setting("openvino", "default", _openvino_default, ("onnx", "onnxscript", "openvino"), dtype="bfloat16"),
    Setting(
        "openvino",
        "int8, NNCF",
        _openvino_int8,
        ("onnx", "onnxscript", "openvino", "nncf"),
        dtype="int8",
        extra="peers",
    ),
)
"""Settings in fewer bits, each with an error."""
PROVIDERS = tuple(dict.fromkeys(setting.provider for setting in SETTINGS))
"""The names of the runtimes, ours first."""


def fingerprint(network: nn.Module, x: Tensor) -> str:
    """A hash of a network's structure, weights and image size; the same for every batch."""
    digest = hashlib.sha256(f"{network}{tuple(x.shape[1:])}{torch.__version__}".encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) < 2 or len(x) % 2:
        raise ValueError(f"a split batch must be even, got {len(x)}")
    first, second = x.chunk(2)
    return first.contiguous(), second.contiguous()


def _channels_last(network: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    moved: nn.Module = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved, x.contiguous(memory_format=torch.channels_last)
