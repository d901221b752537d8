"""Single layers, what they must read, write and multiply, and the ceilings that a GPU sets to that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import Machine
from gatedconv import _native
from gatedconv.ops import cuda_conv

ALL = ("cut cudnn", "cudnn fused", "gatedconv")


@dataclass(frozen=True)
class LayerCase:
    """A convolution that keeps the map's size, with bias and ReLU.

    Attributes:
        inputs: channels that it reads.
        outputs: channels of the stream that it writes.
        open: how many of them it computes; fewer than `outputs` is an "after"-gated layer, which adds into the stream.
        kernel: height and width of the kernel.
        size: height and width of the map.
        providers: who takes part.
    """

    inputs: int
    outputs: int
    open: int
    kernel: int
    size: int
    providers: tuple[str, ...] = ALL

    @property
    def scatters(self) -> bool:
        """Whether it adds into a stream: then every provider does."""
        return self.open < self.outputs

    @property
    def name(self) -> str:
        """For example "16->8 of 16 3x3 @32 + stream"."""
        outputs = f"{self.open} of {self.outputs} + stream" if self.scatters else str(self.outputs)
        return f"{self.inputs}->{outputs} {self.kernel}x{self.kernel} @{self.size}"

    def macs(self, batch: int) -> int:
        """Multiply-adds of what is open."""
        return batch * self.size**2 * self.open * self.inputs * self.kernel**2

    def bytes(self, batch: int, element: int) -> int:
        """Bytes that must move: each input and weight read once, each output written once.

        A stream after a ReLU need not be touched where nothing is added, but its pixels are whole sectors.
        """
        maps = self.inputs + (2 * self.outputs if self.scatters else self.outputs)
        return element * (batch * self.size**2 * maps + self.open * self.inputs * self.kernel**2)

    def build(self, provider: str, batch: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
        """The layer as a provider computes it, on data of its own, channels_last."""
        generator = torch.Generator().manual_seed(0)
        draw = lambda *s: torch.randn(s, generator=generator).to(device, dtype)  # noqa: E731
        last = torch.channels_last
        x = draw(batch, self.inputs, self.size, self.size).to(memory_format=last)
        weight = (draw(self.open, self.inputs, self.kernel, self.kernel) / self.inputs**0.5).to(memory_format=last)
        bias, stream = draw(self.open), draw(batch, self.outputs, self.size, self.size).relu().to(memory_format=last)
        index = torch.randperm(self.outputs, generator=generator)[: self.open].sort().values.to(device)
        pad = self.kernel // 2
        if provider == "gatedconv":
            return self._ours(x, weight, bias, stream, index)
        if provider == "cudnn fused":
            arguments = ([1, 1], [pad, pad], [1, 1], 1)
            return lambda: torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *arguments)
        if self.scatters:
            return lambda: stream.index_add(1, index, F.conv2d(x, weight, bias, 1, pad)).relu_()
        return lambda: F.conv2d(x, weight, bias, 1, pad).relu_()

    def _ours(self, x: Tensor, weight: Tensor, bias: Tensor, stream: Tensor, index: Tensor) -> Callable[[], Tensor]:
        library = _native.load("cuda")
        if not library.available:
            raise RuntimeError(f"no CUDA library: {library.reason}")
        tf32 = x.dtype == torch.float32 and cuda_conv.allows_tf32()
        full, order = weight, None
        if self.scatters:
            full = torch.zeros(self.outputs, *weight.shape[1:], dtype=x.dtype, device=x.device)
            full[index] = weight
            wide = torch.zeros(self.outputs, dtype=x.dtype, device=x.device)
            wide[index], bias = bias, wide
            closed = torch.tensor(sorted(set(range(self.outputs)) - set(index.tolist())), device=x.device)
            order = torch.cat([index, closed, index.new_tensor([self.open])]).int()
        packed, floats = cuda_conv.conv_pack(full, None, tf32), bias.float()
        geometry = [self.kernel, self.kernel, 1, 1, self.kernel // 2, self.kernel // 2, 1, 1]
        residual = stream if self.scatters else None
        return lambda: cuda_conv.conv_run(
            x, packed, floats, None, order, residual, stream, geometry, 1, self.scatters, tf32, (0, 0)
        )


# Layers of ResNet-56 and ResNet-50: mid-50, fully open, after-gated, odd.
LAYERS = (
    LayerCase(16, 8, 8, 3, 32),
    LayerCase(16, 16, 8, 3, 32, ("cut cudnn", "gatedconv")),
    LayerCase(32, 32, 16, 3, 16, ("cut cudnn", "gatedconv")),
    LayerCase(64, 64, 32, 3, 8, ("cut cudnn", "gatedconv")),
    LayerCase(16, 16, 16, 3, 32),
    LayerCase(32, 32, 32, 3, 16),
    LayerCase(64, 64, 64, 3, 8),
    LayerCase(11, 11, 11, 3, 32),
    LayerCase(64, 64, 64, 3, 56),
    LayerCase(64, 256, 256, 1, 56),
    LayerCase(256, 256, 256, 3, 14),
    LayerCase(512, 512, 512, 3, 7),
    LayerCase(128, 512, 256, 1, 28, ("cut cudnn", "gatedconv")),
)


class Ceilings:
    """What this GPU copies and multiplies at best, measured in this run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.per_ms: dict[str, float] = {}  # bytes of "copy", FLOP of a dtype

    def measure(self, machine: Machine, name: str) -> dict[str, Any]:
        """A large copy, bytes read and written; or a large product of random matrices."""
        size = 64 if self.dry else 8192
        dtype = torch.float16 if name == "float16" else torch.float32
        if name == "copy":
            source = torch.randn(size * size * 8, device=machine.device)
            target, work = torch.empty_like(source), 2.0 * source.numel() * 4
            values = machine.measure(lambda: target.copy_(source))
        else:
            a, b = (torch.randn(size, size, device=machine.device, dtype=dtype) for _ in range(2))
            work, matmul = 2.0 * size**3, torch.backends.cuda.matmul
            before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
            try:
                values = machine.measure(lambda: a @ b)
            finally:
                matmul.fp32_precision = before
        self.per_ms[name] = work / values["ms_min"]
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        return {**values, "note": f"{self.per_ms[name] / 1e6:.0f} {unit}"}

    def share(self, layer: LayerCase, batch: int, dtype: str, ms: float) -> float | None:
        """The time that the ceilings allow, over the time taken; None where a ceiling is not known."""
        rate = self.per_ms.get("tf32" if dtype == "tf32" else "float16")
        if rate is None or "copy" not in self.per_ms:
            return None
        element = 4 if dtype == "tf32" else 2
        return max(layer.bytes(batch, element) / self.per_ms["copy"], 2 * layer.macs(batch) / rate) / ms
