"""Stages of the CUDA engine: its tests and sanitizers, single layers with their share of the roofline, whole networks.

Peers run the same cut network in the same run. Every provider's output is compared with float32 before it is timed: a
row of ours whose error is more than twice that of PyTorch in the same type is a failure.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import gatedconv
from benchmarks.gpu.check import TOOLS, sanitized, sharded
from benchmarks.gpu.engine_roofline import LAYERS, Ceilings, LayerCase
from benchmarks.gpu.session import Session
from benchmarks.gpu.stages import Case, stage
from benchmarks.gpu.timing import Machine
from benchmarks.networks import NetworkCase

TESTS = ("tests/cuda/gpu/test_gpu.py", "tests/cuda/gpu/test_resident.py")
SANITIZED = "tests/cuda/gpu/test_sanitized.py"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}
BATCHES = (1, 32, 256)
# provider -> (our kernels, or None for PyTorch; mode of torch.compile; captured in a graph here)
NETWORK_PROVIDERS: dict[str, tuple[str | None, str | None, bool]] = {
    "eager": (None, None, False),
    "eager graph": (None, None, True),
    "cudnn-fused graph": ("off", None, False),
    "gatedconv": ("auto", None, False),
    "gatedconv resident": ("experimental", None, False),
    "compile reduce-overhead": (None, "reduce-overhead", False),
    "tensorrt": (None, None, False),
}
EAGER_S, ENGINE_S, COMPILE_S = 8.0, 25.0, 90.0
# An image's maps stay in shared memory from layer to layer; the other runs launch once a layer.
RESIDENT = "gatedconv resident"
Run = Callable[[Tensor], Tensor]


@stage("check-engine")
def check_engine(session: Session) -> Iterator[Case]:
    """Parity, graphs, streams and networks; then our convolution kernels alone under each sanitizer."""
    yield Case(("check", "engine tests", 0, "", "gatedconv"), 60.0, lambda: sharded(session, TESTS))
    for tool in TOOLS:
        run = lambda tool=tool: sanitized(tool, session, SANITIZED)  # noqa: E731
        yield Case(("check", f"engine {tool}", 0, "", "gatedconv"), 45.0, run)


@stage("bench-engine-layers", baseline="cut cudnn")
def bench_layers(session: Session) -> Iterator[Case]:
    """Ceilings of this GPU first; then layers by ours and by peers, each with its share of what the ceilings allow."""
    machine, ceilings = Machine(session.dry), Ceilings(session.dry)
    for name in ("copy", "float16", "tf32"):
        yield Case(("ceiling", name, 0, "", "measured"), 5.0, lambda name=name: ceilings.measure(machine, name))
    for dtype in DTYPES:
        for layer in LAYERS[:1] if session.dry else LAYERS:
            for batch in (2,) if session.dry else BATCHES:
                for provider in layer.providers:
                    yield layer_case(machine, ceilings, layer, batch, dtype, provider)


def layer_case(machine: Machine, ceilings: Ceilings, layer: LayerCase, batch: int, dtype: str, provider: str) -> Case:
    """One provider on one layer, in a graph."""

    def run() -> dict[str, Any]:
        if machine.dry and provider != "cut cudnn":
            return {"note": "not run: needs a GPU"}
        machine.clean()
        with precision(dtype), torch.inference_mode():
            call = layer.build(provider, batch, DTYPES[dtype], machine.device)
            values = machine.values(call, graph=True)
        share = ceilings.share(layer, batch, dtype, values["ms_median"])
        return {**values, "ratio": share, "note": None if share is None else f"{100 * share:.0f} % of the roofline"}

    return Case(("engine layer", layer.name, batch, dtype, provider), EAGER_S, run)


@stage("bench-engine-cifar", baseline="compile reduce-overhead")
def bench_cifar(session: Session) -> Iterator[Case]:
    """ResNet-56 and -110 at 32x32, mid-50 first."""
    yield from network_cases(session, ("resnet56", "resnet110"), ("mid-50", "dense"))


@stage("bench-engine-imagenet", baseline="compile reduce-overhead")
def bench_imagenet(session: Session) -> Iterator[Case]:
    """ResNet-50 and -18 at 224x224, mid-50 first."""
    yield from network_cases(session, ("resnet50", "resnet18"), ("mid-50", "dense"))


def network_cases(session: Session, models: tuple[str, ...], cuts: tuple[str, ...]) -> Iterator[Case]:
    """What the goals are about first: fp16, the first model, cut; what compiles is last of each group."""
    machine = Machine(session.dry)
    if session.dry:
        for provider in NETWORK_PROVIDERS:
            yield network_case(machine, NetworkCase(models[-1], cuts[0], 1), "bfloat16", provider)
        return
    for dtype in DTYPES:
        for cut in cuts:
            for model in models:
                for batch in BATCHES:
                    for provider in NETWORK_PROVIDERS:
                        if provider != RESIDENT or NetworkCase(model, cut, batch).image_size == 32:
                            yield network_case(machine, NetworkCase(model, cut, batch), dtype, provider)


def network_case(machine: Machine, case: NetworkCase, dtype: str, provider: str) -> Case:
    """One provider on one network."""
    kernels, compiled, graph = NETWORK_PROVIDERS[provider]
    seconds = COMPILE_S if compiled or provider == "tensorrt" else EAGER_S if kernels is None else ENGINE_S

    def run() -> dict[str, Any]:
        if provider == "tensorrt" and importlib.util.find_spec("torch_tensorrt") is None:
            return {"note": "not run: torch_tensorrt is not installed"}
        machine.clean()
        network, x = case.build()
        network, x = network.to(machine.device), x.to(machine.device)
        with precision(dtype), switched(kernels), torch.inference_mode():
            images = x if machine.dry else several(x)
            with precision("float32"):
                exact = batched(network, images, case.batch)
            low, given = copy.deepcopy(network).to(DTYPES[dtype]), x.to(DTYPES[dtype])
            run = build(machine, provider, compiled, low, given)
            if provider == RESIDENT and not machine.dry:
                run(given)  # what it takes is chosen at the first call
                if "one launch" not in run.describe():  # type: ignore[attr-defined]
                    return {"note": "not run: no layers of it fit into shared memory"}
            error, theirs = (
                deviation(batched(f, images.to(DTYPES[dtype]), case.batch), exact) for f in (run, low)
            )
            allowed = 2 * theirs
            if error > max(allowed, 1e-5):
                raise RuntimeError(f"error {error:.1e}, twice PyTorch's own is {allowed:.1e}")
            values = machine.values(lambda: run(given), graph, inner=compiled is None)
        return {**values, "error": error}

    return Case(("engine network", case.name, case.batch, dtype, provider), seconds, run)


def build(machine: Machine, provider: str, compiled: str | None, network: nn.Module, x: Tensor) -> Run:
    """The network as a provider runs it, in channels_last wherever it is asked."""
    if NETWORK_PROVIDERS[provider][0] is not None:
        if machine.dry:
            return network  # there is no engine for these types on a CPU
        return gatedconv.Engine(network, x)
    network = network.to(memory_format=torch.channels_last)
    if provider == "tensorrt":
        import torch_tensorrt

        compiled_network = torch_tensorrt.compile(network, ir="dynamo", inputs=[x], enabled_precisions={x.dtype})
        return lambda x: compiled_network(x)
    if compiled is not None:
        with torch._inductor.config.patch(freezing=True):
            run = machine.compile(network, compiled, True)
            run(x.contiguous(memory_format=torch.channels_last))  # compiles here, where freezing is on
    else:
        run = network
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))


def several(x: Tensor, count: int = 64) -> Tensor:
    """At least that many images, in whole batches, x first: a few logits alone tell little of an error."""
    batches = max(1, -(-count // len(x)))
    generator = torch.Generator().manual_seed(1)
    more = torch.randn((batches - 1) * len(x), *x.shape[1:], generator=generator)
    return torch.cat([x, more.to(x.device)])


def batched(run: Run, images: Tensor, batch: int) -> Tensor:
    """What a network returns for images that it is given batch by batch; its results may share memory."""
    return torch.cat([run(part).clone() for part in images.split(batch)])


def deviation(result: Tensor, exact: Tensor) -> float:
    """Root mean square of a - b over that of b; infinite where there is a NaN."""
    difference = (result.double() - exact.double()).square().mean()
    value = float((difference / exact.double().square().mean()).sqrt())
    return value if value == value else float("inf")


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let float32 convolutions and products use tf32 where that is what is measured, and nowhere else."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


@contextlib.contextmanager
def switched(mode: str | None) -> Iterator[None]:
    """GATEDCONV_CUDA_KERNELS for the time being; None leaves it."""
    before = os.environ.get("GATEDCONV_CUDA_KERNELS")
    if mode is not None:
        os.environ["GATEDCONV_CUDA_KERNELS"] = mode
    try:
        yield
    finally:
        os.environ.pop("GATEDCONV_CUDA_KERNELS", None)
        if before is not None:
            os.environ["GATEDCONV_CUDA_KERNELS"] = before
