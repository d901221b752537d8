"""One convolution with some of its outputs closed: cases as text, and every algorithm that computes one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv.bench.comparison import CandidateName, Comparison
from gatedconv.bench.exported import Run
from gatedconv.bench.runtimes import OURS
from gatedconv.deploy import freeze
from gatedconv.nn import Conv2d
from gatedconv.ops import masked_conv2d

SAMPLE_MS = 3.0

_LETTERS = {
    "n": "batch",
    "i": "in_channels",
    "o": "out_channels",
    "h": "height",
    "w": "width",
    "k": "kernel",
    "s": "stride",
    "p": "padding",
    "d": "dilation",
    "g": "groups",
    "open": "open",
}
_TOKEN = re.compile(f"({'|'.join(sorted(_LETTERS, key=len, reverse=True))})([0-9]{{1,9}}|odd)")
_MOST_ELEMENTS = 2**28  # of a tensor: 1 GiB


@dataclass(frozen=True)
class ConvCase:
    """A square kernel on a batch of maps, and how many of its outputs are open.

    As text: ``n8 i16 o32 h32 k3 s2 open50``, in any order, with blanks or hyphens between. ``i``, ``o``, ``h`` and
    ``k`` are required; the others are n1, w as h, s1, p half of the kernel, d1, g1 and open100.

    Attributes:
        in_channels: C_in.
        out_channels: C_out.
        height: of the input map.
        kernel: height and width of the kernel.
        batch: images per call.
        width: of the input map, None for its height.
        stride: in both directions.
        padding: on all sides, None for half of the kernel, rounded down.
        dilation: in both directions.
        groups: of channels.
        open: percentage of the outputs that are open, or "odd" for an odd number of them, just under half.

    Raises:
        ValueError: there is no such convolution, or its tensors would be larger than 1 GiB.
    """

    in_channels: int
    out_channels: int
    height: int
    kernel: int
    batch: int = 1
    width: int | None = None
    stride: int = 1
    padding: int | None = None
    dilation: int = 1
    groups: int = 1
    open: int | str = 100

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "height", "kernel", "batch", "stride", "dilation", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"case {str(self)!r}: {name} must be at least 1, got {getattr(self, name)}")
        if self.width == 0:
            raise ValueError(f"case {str(self)!r}: width must be at least 1, got 0")
        if self.open != "odd" and not (isinstance(self.open, int) and 0 <= self.open <= 100):
            raise ValueError(f'case {str(self)!r}: open must be a percentage from 0 to 100 or "odd", got {self.open}')
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"case {str(self)!r}: {self.groups} groups do not divide the channels")
        if min(self.out_size) < 1:
            raise ValueError(f"case {str(self)!r}: the kernel is larger than the padded map")
        maps = self.in_channels * self.size[0] * self.size[1], self.out_channels * self.out_size[0] * self.out_size[1]
        weights = self.out_channels * self.in_channels // self.groups * self.kernel**2
        if max(self.batch * max(maps), weights) > _MOST_ELEMENTS:
            raise ValueError(f"case {str(self)!r}: a tensor would be larger than 1 GiB")

    @classmethod
    def parse(cls, text: str) -> ConvCase:
        """Read a case.

        Raises:
            ValueError: the text is not of this form; the message names the part that is wrong.
        """
        found: dict[str, int | str] = {}
        for token in _tokens(text):
            match = _TOKEN.fullmatch(token)
            if match is None or (match[2] == "odd") > (match[1] == "open"):
                raise ValueError(f"case {text!r}: expected parts such as in 'n1 i96 o24 h56 k3 open50', got {token!r}")
            name = _LETTERS[match[1]]
            if name in found:
                raise ValueError(f"case {text!r}: {match[1]} is given twice")
            found[name] = match[2] if match[2] == "odd" else int(match[2])
        missing = [letter for letter in "iohk" if _LETTERS[letter] not in found]
        if missing:
            raise ValueError(f"case {text!r}: {', '.join(missing)} missing, as in 'n1 i96 o24 h56 k3 open50'")
        return cls(**found)  # type: ignore[arg-type]

    @staticmethod
    def is_meant(text: str) -> bool:
        """Whether a text looks like a case, right or wrong, and not like the name of a file or model."""
        return sum(bool(_TOKEN.fullmatch(token)) for token in _tokens(text)) > 1

    def __str__(self) -> str:
        """The text, without what is as by default but the batch and the share of open outputs."""
        default = {field.name: field.default for field in fields(self)}
        shown = {letter: name for letter, name in _LETTERS.items() if getattr(self, name) != default[name]}
        shown |= {letter: _LETTERS[letter] for letter in ("n", "open")}
        return " ".join(f"{letter}{getattr(self, _LETTERS[letter])}" for letter in _LETTERS if letter in shown)

    @property
    def shape(self) -> str:
        """For example "16->32 3x3/2 @32": channels, kernel, stride if it is not 1, size of the input map."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        height, width = self.size
        extras = "" if self.padding is None else f" p{self.padding}"
        extras += f" d{self.dilation}" * (self.dilation > 1) + f" g{self.groups}" * (self.groups > 1)
        size = f"{height}" if height == width else f"{height}x{width}"
        return f"{self.in_channels}->{self.out_channels} {self.kernel}x{self.kernel}{stride}{extras} @{size}"

    @property
    def name(self) -> str:
        """The name in result rows, which have the batch apart."""
        share = f"{self.open} %" if self.open != "odd" else f"{self.open_count} of {self.out_channels}"
        return f"{self.shape}, {share} open"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input map."""
        return self.height, self.height if self.width is None else self.width

    @property
    def pad(self) -> int:
        """Padding on every side."""
        return self.kernel // 2 if self.padding is None else self.padding

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output map."""
        reach = self.dilation * (self.kernel - 1) + 1
        height, width = ((length + 2 * self.pad - reach) // self.stride + 1 for length in self.size)
        return height, width

    @property
    def open_count(self) -> int:
        """How many outputs are open."""
        if self.open == "odd":
            return self.out_channels * 7 // 16 | 1
        return round(self.out_channels * int(self.open) / 100)

    def mask(self) -> Tensor:
        """Bool (C_out,), the open ones at random places, the same in every call."""
        order = torch.randperm(self.out_channels, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(self.out_channels, dtype=torch.bool)
        mask[order[: self.open_count]] = True
        return mask

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random input (N, C_in, H, W), weight (C_out, C_in / groups, K, K) and bias (C_out,), float32."""
        generator = torch.Generator().manual_seed(1)
        weight = self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel
        shapes = (self.batch, self.in_channels, *self.size), weight, (self.out_channels,)
        x, w, b = (torch.randn(shape, generator=generator) for shape in shapes)
        return x, w, b


def compare_layers(case: ConvCase, sample_ms: float = SAMPLE_MS) -> Comparison:
    """All algorithms for a case, for interleaved timing; ``conv2d`` and ``mkldnn`` compute the closed outputs, too."""
    x, weight, bias = case.tensors()
    dense = F.conv2d(x, weight, bias, case.stride, case.pad, case.dilation, case.groups)
    masked = dense * case.mask()[:, None, None]
    builders: dict[CandidateName, Callable[[], Run]] = {}
    for layout, memory_format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        arranged = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format), bias
        for (provider, setting), build in _ALGORITHMS.items():
            if build is _compact and case.groups > 1:
                continue  # what is left of the groups would differ in size
            name = f"{setting}, {layout}" if setting else layout
            builders[provider, name] = partial(build, case, *arranged)
    builders = dict(sorted(builders.items(), key=lambda item: item[0][0] != OURS))
    expected = {candidate: dense if candidate[0] in ("conv2d", "mkldnn") else masked for candidate in builders}
    # All run on PyTorch's own threads: there is no other pool to wait for.
    return Comparison("layer", case.name, case.batch, builders, expected, sample_ms=sample_ms, wait=False)


def _masked(case: ConvCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    mask = case.mask()
    stride, padding, dilation, groups = case.stride, case.pad, case.dilation, case.groups
    return lambda: masked_conv2d(
        x, weight, bias, mask, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def _frozen(case: ConvCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    geometry = case.kernel, case.stride, case.pad, case.dilation, case.groups
    layer = nn.Sequential(Conv2d(case.in_channels, case.out_channels, *geometry, gate="channel"))
    with torch.no_grad():
        layer[0].weight = nn.Parameter(weight)
        layer[0].bias = nn.Parameter(bias)
    frozen = freeze(layer.eval(), masks={"0.gate": case.mask()})
    return lambda: frozen(x)


def _dense(case: ConvCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    return lambda: F.conv2d(x, weight, bias, case.stride, case.pad, case.dilation, case.groups)


def _compact(case: ConvCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    """The open outputs alone, then scattered to their places."""
    index = case.mask().nonzero().flatten()
    layout = _layout(x)
    kept, kept_bias = weight[index].contiguous(memory_format=_layout(weight)), bias[index]
    shape, geometry = (len(x), len(weight), *case.out_size), (case.stride, case.pad, case.dilation)

    def run() -> Tensor:
        out = torch.empty(shape, memory_format=layout).zero_()
        return out.index_add_(1, index, F.conv2d(x, kept, kept_bias, *geometry)) if len(index) else out

    return run


def _mkldnn(case: ConvCase, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    """PyTorch's oneDNN operator with its weights packed beforehand, as compiled PyTorch calls it."""
    geometry = [case.pad] * 2, [case.stride] * 2, [case.dilation] * 2, case.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


_ALGORITHMS: dict[CandidateName, Callable[[ConvCase, Tensor, Tensor, Tensor], Run]] = {
    (OURS, "masked_conv2d"): _masked,
    (OURS, "frozen Conv2d"): _frozen,
    ("conv2d", ""): _dense,
    ("conv2d on compact weights", ""): _compact,
    ("mkldnn", "packed"): _mkldnn,
}


def _tokens(text: str) -> list[str]:
    return [token for token in re.split(r"[\s-]+", text) if token]


def _layout(tensor: Tensor) -> torch.memory_format:
    nhwc = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format
