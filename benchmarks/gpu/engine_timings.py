"""The engine on a GPU: whole networks with every candidate's time, and single layers, against PyTorch and cuDNN.

Every output is compared with float32 first: an error of more than twice that of PyTorch in the same type fails. Peers
choose algorithms by measurement (`cudnn.benchmark`), and copy input and output of their graph as `Engine` does.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedconv
from benchmarks.harness import Call, Machine, precision, variable
from benchmarks.networks import NetworkCase
from gatedconv.bench.comparison import Row
from gatedconv.ops import _masked_conv2d_cuda

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}
# Provider: GATEDCONV_CUDA_KERNELS, None for PyTorch.
PROVIDERS: dict[str, str | None] = {
    "eager graph": None,
    "cudnn fused": "off",
    "gatedconv": "auto",
    "gatedconv resident": "experimental",
    "compile reduce-overhead": None,
}
EAGER = ("eager graph", "cudnn fused", "gatedconv", "gatedconv resident")
COMPILED = "compile reduce-overhead"
Forward = Callable[[Tensor], Tensor]


def network_rows(machine: Machine, model: str, variant: str, batch: int, dtype: str, provider: str) -> list[Row]:
    """One provider on one network; for ours also a row of every candidate that the tuner measured."""
    if machine.dry:
        model, batch, dtype = "resnet20", min(batch, 2), "bfloat16"
    case = NetworkCase(model, variant, batch)
    network, x = case.build()
    x = x[:, :, :8, :8] if machine.dry else x
    network, x = network.to(machine.device), x.to(machine.device)
    with tempfile.TemporaryDirectory() as cache, variable("GATEDCONV_CACHE", None if machine.dry else cache):
        with precision(dtype), variable("GATEDCONV_CUDA_KERNELS", PROVIDERS[provider]), torch.inference_mode():
            images = _several(x, 1 if machine.dry else 64)
            with precision("float32"):
                exact = _batched(network, images, batch)
            low, given = copy.deepcopy(network).to(DTYPES[dtype]), x.to(DTYPES[dtype])
            run = build(machine, provider, low, given)
            errors = [deviation(_batched(f, images.to(DTYPES[dtype]), batch), exact) for f in (run, low)]
            if errors[0] > max(2 * errors[1], 1e-5):
                raise RuntimeError(f"error {errors[0]:.1e}, twice PyTorch's own is {2 * errors[1]:.1e}")
            inputs = machine.copies(lambda: torch.randn_like(given))
            values = machine.values([partial(run, x) for x in inputs], False, inner=provider != COMPILED)
        row = Row("engine", case.name, batch, dtype, provider, error=errors[0], **values)
        return [row, *_candidates(Path(cache), case, dtype, provider)]


def build(machine: Machine, provider: str, network: nn.Module, x: Tensor) -> Forward:
    """The network as a provider runs it: input in NCHW, output in memory of its own."""
    if PROVIDERS[provider] is not None and not machine.dry:
        return gatedconv.Engine(network, x)
    if PROVIDERS[provider] is not None:  # there is no engine for half precision on a CPU, but its plans run there
        return _dry_plan(network, x, provider) if machine.stands_in else network
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = {"memory_format": torch.channels_last}
    if provider == COMPILED:
        with torch._inductor.config.patch(freezing=True):
            compiled = machine.compile(network, "reduce-overhead", True)
            compiled(x.contiguous(**last))  # compiles here, where freezing is on
        return lambda x: compiled(x.contiguous(**last)).clone()
    static = x.clone(**last)
    replay = machine.captured(lambda: network(static))

    def run(x: Tensor) -> Tensor:
        static.copy_(x)
        result: Tensor = replay()
        return result.clone()

    return run


def _dry_plan(network: nn.Module, x: Tensor, provider: str) -> Forward:
    """The plan of an `Engine` on the CPU: each convolution by the widest tile of ours, or all of them in one launch."""
    from tests.cuda.plans import always, make_plan

    tuner = always("resident x1") if provider == "gatedconv resident" else _Widest()
    return make_plan(network, x, dtype=x.dtype, mode=PROVIDERS[provider], tuner=tuner)


class _Widest:
    """A tuner that measures nothing."""

    def choose(self, key: str, candidates: Mapping[str, object], prefer: str = "") -> str:
        """Return the last candidate of one row of fragments: they come in order of width."""
        return [name for name in candidates if not name.startswith("gatedconv 2")][-1]


def _candidates(cache: Path, case: NetworkCase, dtype: str, provider: str) -> Iterator[Row]:
    """A row of every candidate in the tuner's file: its time, or why it was refused."""
    for path in sorted(cache.glob("tuned-*.json")):
        for key, choice in json.loads(path.read_text())["choices"].items():
            name = f"{case.name}: {key}"
            for candidate, ms in choice["ms"].items():
                note = "chosen" if candidate == choice["candidate"] else None
                yield Row("candidate", name, case.batch, dtype, candidate, provider, ms_median=ms, note=note)
            for candidate, reason in choice["out"].items():
                note = f"failed: {reason}" if reason == "wrong result" else reason
                yield Row("candidate", name, case.batch, dtype, candidate, provider, note=note)


def _several(x: Tensor, count: int) -> Tensor:
    """At least ``count`` images in whole batches, x first: the error of few logits is noisy."""
    batches = max(1, -(-count // len(x)))
    generator = torch.Generator().manual_seed(1)
    more = torch.randn((batches - 1) * len(x), *x.shape[1:], generator=generator)
    return torch.cat([x, more.to(x.device)])


def _batched(run: Forward, images: Tensor, batch: int) -> Tensor:
    return torch.cat([run(part).clone() for part in images.split(batch)])


def deviation(result: Tensor, exact: Tensor) -> float:
    """Root mean square of a - b over that of b; infinite for NaN."""
    difference = (result.double() - exact.double()).square().mean()
    value = float((difference / exact.double().square().mean()).sqrt())
    return value if value == value else float("inf")


@dataclass(frozen=True)
class LayerCase:
    """A convolution that keeps the map's size, with bias and ReLU.

    Attributes:
        inputs: input channels.
        outputs: output channels of the stream.
        open: computed outputs; fewer than `outputs` add into the stream, as in a layer gated "after".
        kernel: height and width of the kernel.
        size: height and width of the map.
    """

    inputs: int
    outputs: int
    open: int
    kernel: int
    size: int

    @property
    def name(self) -> str:
        """For example "16->8 of 16 3x3 @32"."""
        outputs = f"{self.open} of {self.outputs}" if self.open < self.outputs else str(self.outputs)
        return f"{self.inputs}->{outputs} {self.kernel}x{self.kernel} @{self.size}"


# Of ResNet-56 and ResNet-50: mid-50, "after" half open, fully open.
LAYERS = (
    LayerCase(16, 16, 8, 3, 32),
    LayerCase(16, 8, 8, 3, 32),
    LayerCase(64, 64, 32, 3, 8),
    LayerCase(64, 64, 64, 3, 8),
    LayerCase(256, 256, 256, 3, 14),
    LayerCase(128, 512, 256, 1, 28),
)


def layer_rows(machine: Machine, layer: LayerCase, batch: int = 32, dtype: str = "float16") -> list[Row]:
    """Every provider on one layer, in a graph. A layer that adds into a stream has two peers.

    "compact cudnn" convolves the open outputs and adds them in place by index (atomics); "dense cudnn" convolves all
    outputs with zero rows for the closed ones, fused with the addition and ReLU. Ours has to beat the faster one.
    """
    if machine.dry:
        layer, batch, dtype = replace(layer, size=8), 2, "bfloat16"
    rows = []
    with precision(dtype), torch.inference_mode():
        providers = layer_providers(machine, layer, batch, DTYPES[dtype])
        exact = providers["compact cudnn"][0]()
        for provider, calls in providers.items():
            error = float((calls[0]().double() - exact.double()).abs().max() / exact.double().abs().max())
            note = f"failed: error {error:.1e}" if not error <= 2e-2 else None
            rows.append(
                Row("layer", layer.name, batch, dtype, provider, error=error, note=note, **machine.values(calls, True))
            )
    return rows


def layer_providers(machine: Machine, layer: LayerCase, batch: int, dtype: torch.dtype) -> dict[str, list[Call]]:
    """Provider -> the layer on rotating inputs, all in channels_last."""
    generator, last, pad = torch.Generator().manual_seed(0), torch.channels_last, layer.kernel // 2
    draw = lambda *s: torch.randn(s, generator=generator).to(machine.device, dtype)  # noqa: E731
    weight = (draw(layer.open, layer.inputs, layer.kernel, layer.kernel) / layer.inputs**0.5).to(memory_format=last)
    bias, scatters = draw(layer.open), layer.open < layer.outputs
    index = torch.randperm(layer.outputs, generator=generator)[: layer.open].sort().values.to(machine.device)
    maps = machine.copies(lambda: draw(batch, layer.inputs, layer.size, layer.size).to(memory_format=last))
    stream = draw(batch, layer.outputs, layer.size, layer.size).relu().to(memory_format=last)
    wide, wide_bias = weight.new_zeros(layer.outputs, *weight.shape[1:]), bias.new_zeros(layer.outputs)
    wide[index], wide_bias[index] = weight, bias

    def compact(x: Tensor) -> Tensor:
        out = F.conv2d(x, weight, bias, 1, pad)
        return (stream.index_add(1, index, out) if scatters else out).relu_()

    def dense(x: Tensor) -> Tensor:
        arguments = ([1, 1], [pad, pad], [1, 1], 1)
        if machine.dry:
            return (F.conv2d(x, wide, wide_bias, 1, pad) + (stream if scatters else 0)).relu_()
        if scatters:
            return torch.ops.aten.cudnn_convolution_add_relu(x, wide, stream, 1.0, wide_bias, *arguments)
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *arguments)

    found: dict[str, Forward] = {"compact cudnn": compact, "dense cudnn": dense}
    if machine.stands_in:
        found["gatedconv"] = _ours(layer, wide if scatters else weight, wide_bias if scatters else bias, stream, index)
    return {name: [partial(run, x) for x in maps] for name, run in found.items()}


def _ours(layer: LayerCase, weight: Tensor, bias: Tensor, stream: Tensor, index: Tensor) -> Forward:
    scatters = layer.open < layer.outputs
    tf32 = weight.dtype == torch.float32 and _masked_conv2d_cuda.allows_tf32()
    closed = torch.tensor(sorted(set(range(layer.outputs)) - set(index.tolist())), device=weight.device)
    order = torch.cat([index, closed.long(), index.new_tensor([layer.open])]).int() if scatters else None
    packed, floats, pad = _masked_conv2d_cuda.conv_pack(weight, None, tf32), bias.float(), layer.kernel // 2
    geometry = [layer.kernel, layer.kernel, 1, 1, pad, pad, 1, 1]
    output, residual = torch.empty_like(stream), stream if scatters else None

    def run(x: Tensor) -> Tensor:
        tile = (0, 0)  # the library's choice by size; an `Engine` measures every tile
        return _masked_conv2d_cuda.conv_run(
            x, packed, floats, None, order, residual, output, geometry, 1, False, tf32, tile
        )

    return run
