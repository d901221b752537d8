"""The measured convolutions, and the algorithms for one with closed outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedconv
from gatedconv.report.bench import Candidate, Comparison
from gatedconv.report.runtimes import OURS, Run

BATCHES = (1, 8, 32)
OPEN = (0, 25, 50, 75, 100, "odd")
SAMPLE_MS = 3.0
MOST_ROUNDS = 7  # of 234 cases with ten candidates each


@dataclass(frozen=True)
class Shape:
    """A convolution: in -> out channels, square kernel, padded to keep the size, on a square map."""

    family: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int

    @property
    def name(self) -> str:
        """For example "16->32 3x3/2 @32": channels, kernel, stride if it is not 1, size of the input map."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.in_channels}->{self.out_channels} {self.kernel}x{self.kernel}{stride} @{self.size}"


SHAPES = (
    Shape("cifar", 3, 16, 3, 1, 32),
    Shape("cifar", 16, 16, 3, 1, 32),
    Shape("cifar", 16, 32, 3, 2, 32),
    Shape("cifar", 32, 32, 3, 1, 16),
    Shape("cifar", 32, 64, 3, 2, 16),
    Shape("cifar", 64, 64, 3, 1, 8),
    Shape("imagenet", 3, 64, 7, 2, 224),
    Shape("imagenet", 64, 64, 3, 1, 56),
    Shape("imagenet", 64, 256, 1, 1, 56),
    Shape("imagenet", 128, 128, 3, 1, 28),
    Shape("imagenet", 256, 256, 3, 1, 14),
    Shape("imagenet", 1024, 256, 1, 1, 14),
    Shape("imagenet", 512, 512, 3, 1, 7),
)


@dataclass(frozen=True)
class LayerCase:
    """A convolution, a batch and the share of open outputs: percent, or "odd" for just under half."""

    shape: Shape
    batch: int
    open: int | str

    @property
    def name(self) -> str:
        """As result rows call it."""
        share = f"{self.open} %" if self.open != "odd" else f"{self.open_count} of {self.shape.out_channels}"
        return f"{self.shape.name}, {share} open"

    @property
    def open_count(self) -> int:
        """How many outputs are open."""
        if self.open == "odd":
            return self.shape.out_channels * 7 // 16 | 1
        return round(self.shape.out_channels * int(self.open) / 100)

    @property
    def quick(self) -> bool:
        """Whether it belongs to the short selection."""
        return self.shape.family == "cifar" and self.batch == 8 and self.open in (50, 100)

    def mask(self) -> Tensor:
        """Bool (out_channels,), the open ones at random places."""
        order = torch.randperm(self.shape.out_channels, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(self.shape.out_channels, dtype=torch.bool)
        mask[order[: self.open_count]] = True
        return mask


CASES = tuple(LayerCase(shape, batch, share) for shape in SHAPES for batch in BATCHES for share in OPEN)


def compare_layers(case: LayerCase, sample_ms: float = SAMPLE_MS) -> Comparison:
    """All algorithms for the case; ``conv2d`` and ``mkldnn`` compute the closed outputs, too."""
    shape = case.shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, shape.in_channels, shape.size, shape.size, generator=generator)
    weight = torch.randn(shape.out_channels, shape.in_channels, shape.kernel, shape.kernel, generator=generator)
    bias = torch.randn(shape.out_channels, generator=generator)
    dense = F.conv2d(x, weight, bias, shape.stride, shape.kernel // 2)
    masked = dense * case.mask()[:, None, None]
    builders: dict[Candidate, Callable[[], Run]] = {}
    for layout in ("NCHW", "channels_last"):
        arranged = _arranged(x, layout), _arranged(weight, layout), bias
        for (provider, setting), build in _ALGORITHMS.items():
            name = f"{setting}, {layout}" if setting else layout
            builders[provider, name] = lambda b=build, a=arranged: b(case, *a)
    builders = dict(sorted(builders.items(), key=lambda item: item[0][0] != OURS))
    expected = {candidate: dense if candidate[0] in ("conv2d", "mkldnn") else masked for candidate in builders}
    # All run on PyTorch's own threads: there is no other pool to wait for.
    return Comparison("layer", case.name, case.batch, builders, expected, sample_ms=sample_ms, wait=False)


def _masked(case: LayerCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    mask, shape = case.mask(), case.shape
    return lambda: gatedconv.ops.masked_conv2d(x, weight, bias, mask, stride=shape.stride, padding=shape.kernel // 2)


def _frozen(case: LayerCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    shape = case.shape
    layer = nn.Sequential(
        gatedconv.Conv2d(
            shape.in_channels,
            shape.out_channels,
            shape.kernel,
            shape.stride,
            shape.kernel // 2,
            gate="channel",
        )
    )
    with torch.no_grad():
        layer[0].weight = nn.Parameter(weight)
        layer[0].bias = nn.Parameter(bias)
    frozen = gatedconv.freeze(layer.eval(), masks={"0.gate": case.mask()})
    return lambda: frozen(x)


def _dense(case: LayerCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    stride, padding = case.shape.stride, case.shape.kernel // 2
    return lambda: F.conv2d(x, weight, bias, stride, padding)


def _compact(case: LayerCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    """The open outputs alone, then scattered to their places."""
    index = case.mask().nonzero().flatten()
    stride, padding = case.shape.stride, case.shape.kernel // 2
    kept, kept_bias = weight[index].contiguous(memory_format=_layout(weight)), bias[index]
    size = -(-x.shape[2] // stride)
    shape, layout = (len(x), len(weight), size, size), _layout(x)

    def run() -> Tensor:
        out = torch.empty(shape, memory_format=layout).zero_()
        return out.index_add_(1, index, F.conv2d(x, kept, kept_bias, stride, padding)) if len(index) else out

    return run


def _mkldnn(case: LayerCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    """PyTorch's oneDNN operator with its weights packed beforehand, as compiled PyTorch calls it."""
    stride, padding = [case.shape.stride] * 2, [case.shape.kernel // 2] * 2
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, [1, 1], 1, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, [1, 1], 1, "none", [], "")


_ALGORITHMS: dict[Candidate, Callable[[LayerCase, Tensor, Tensor, Tensor], Run]] = {
    (OURS, "masked_conv2d"): _masked,
    (OURS, "frozen Conv2d"): _frozen,
    ("conv2d", ""): _dense,
    ("conv2d on cut weights", ""): _compact,
    ("mkldnn", "packed"): _mkldnn,
}


def _layout(tensor: Tensor) -> torch.memory_format:
    nhwc = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def _arranged(tensor: Tensor, layout: str) -> Tensor:
    channels_last = layout == "channels_last"
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
