"""Small modules that conversion and compacting leave in a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gatedconv.nn.conv import Conv2d


class FrozenConv2d(Conv2d):
    """A convolution that computes the channels of ``out_open`` alone; the others leave as exact zeros.

    It shares the parameters of the convolution that it is made from.
    """

    out_open: Tensor

    def __init__(self, conv: nn.Conv2d, out_open: Tensor) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            False,
            conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("out_open", out_open)

    def forward(self, input: Tensor) -> Tensor:
        """Input (N, in_channels, H, W) -> (N, out_channels, H_out, W_out)."""
        return self.masked_forward(input, self.out_open)


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
        self,
        channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
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
