"""Small modules that conversion and compacting leave in a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.nn.conv import Conv2d


class SelectOpen(nn.Module):
    """(x (N, ...), gate (N, 1)) -> the samples whose gate is open; in training all of them.

    Training computes every sample, so that BatchNorm sees the whole batch, and so does a compiled graph,
    whose shapes must not depend on data.

    Args:
        at_least: 1 for a branch whose layers refuse an empty batch: where no sample is open, it gets the first.
    """

    def __init__(self, at_least: int = 0) -> None:
        super().__init__()
        self.at_least = at_least

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Select the samples."""
        if self.training or torch.compiler.is_compiling():
            return x
        index = gate.flatten().nonzero().flatten()
        return x.index_select(0, index) if index.numel() >= self.at_least else x[: self.at_least]

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"at_least={self.at_least}" if self.at_least else ""


class AddBranch(nn.Module):
    """(shortcut (N, ...), part, gate (N, 1)) -> shortcut + gate * part.

    ``part`` has N samples, or the open ones alone, as ``SelectOpen`` left them; it is not read where none is open.
    """

    def forward(self, shortcut: Tensor, part: Tensor, gate: Tensor) -> Tensor:
        """Add the branch to the samples that are open."""
        factor = gate.reshape(-1, *[1] * (part.dim() - 1))
        if part.shape[0] == gate.shape[0]:
            return shortcut + factor * part
        index = gate.flatten().nonzero().flatten()
        return shortcut.index_add(0, index, factor.index_select(0, index) * part)


class FrozenConv2d(Conv2d):
    """A convolution that computes the channels of ``out_open`` alone; the others leave as exact zeros.

    It shares the parameters of the convolution that it is made from.
    """

    out_open: Tensor

    def __init__(self, conv: nn.Conv2d, out_open: Tensor) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, False, conv.padding_mode, device="meta",
        )  # fmt: skip
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("out_open", out_open)

    def forward(self, input: Tensor) -> Tensor:
        """Input (N, in_channels, H, W) -> (N, out_channels, H_out, W_out)."""
        return self.masked_forward(input, self.out_open)


class StochasticDepth(nn.Module):
    """Drops its input at random in training, for single samples ("row") or the whole batch ("batch").

    Huang et al. 2016. What survives is divided by 1 - p if ``scale``; in eval the identity.
    """

    def __init__(self, p: float, mode: str = "row", scale: bool = True) -> None:
        super().__init__()
        self.p = p
        self.mode = mode
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """X (N, ...) -> the same shape."""
        if not self.training or self.p == 0:
            return x
        count = x.shape[0] if self.mode == "row" else 1
        kept = torch.empty(count, *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        if self.scale and self.p < 1:
            kept = kept / (1 - self.p)
        return x * kept

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"p={self.p}, mode={self.mode}, scale={self.scale}"


class ScatterChannels(nn.Module):
    """x with K channels -> ``size`` channels along ``axis``: x at ``index``, constants elsewhere.

    Args:
        index: int64 (K,).
        fill: what the result is where x has no channel: shape (1, ...) with ``size`` at ``axis`` and
            otherwise as x, or 1.
        axis: the channels' dimension.
    """

    index: Tensor
    fill: Tensor

    def __init__(self, index: Tensor, fill: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("fill", fill)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Put x among the constants."""
        shape = list(x.shape)
        shape[self.axis] = self.fill.shape[self.axis]
        return self.fill.to(x.dtype).expand(shape).index_copy(self.axis, self.index, x)

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"channels={self.index.numel()} of {self.fill.shape[self.axis]}, axis={self.axis}"


class Framed(nn.Sequential):
    """A layer of a compact model with the small modules that choose its channels: gather, layer, pick, scatter.

    Attributes that it does not have are those of the layer.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("gather", "layer", "pick", "scatter"):
                raise
            return getattr(super().__getattr__("layer"), name)


class EmptyMap(nn.Module):
    """x (N, C, H, W) -> zeros (N, channels, H', W'): what is left of a convolution whose outputs nobody needs.

    Args:
        channels: of the result.
        kernel_size, stride, padding, dilation: two ints each, of the convolution.
    """

    def __init__(
        self, channels: int, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = channels
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation

    def forward(self, x: Tensor) -> Tensor:
        """Work out the size."""
        height, width = (
            (x.shape[2 + d] + 2 * self.padding[d] - self.dilation[d] * (self.kernel_size[d] - 1) - 1) // self.stride[d]
            + 1
            for d in (0, 1)
        )
        return x.new_zeros((x.shape[0], self.channels, height, width))


class AppendOnes(nn.Module):
    """x (N, C, H, W) -> (N, C + 1, H, W): one more channel, all ones.

    A constant that a zero-padded convolution sees fades at the border; the channel of ones carries all
    such constants at once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Append the channel."""
        return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


class Constant(nn.Module):
    """x (N, ...) -> ``value`` (1, ...) for each of the N samples: what does not depend on the input."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=value.is_floating_point())
        self._kept = (-1,) * (value.dim() - 1)  # a number for any tracer

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the value."""
        return self.value.expand(x.shape[0], *self._kept)

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"shape={tuple(self.value.shape[1:])}"
