"""Small modules that conversion and compacting leave in a network: plain modules and constant indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.nn.conv import Conv2d

_HOOKS = (
    "_forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks "
    "_forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks _is_full_backward_hook"
).split()
_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def take_place(new: nn.Module, old: nn.Module, *, hooks: bool = True) -> None:
    """Give a module that replaces another one its attributes, those of the user too, and its hooks."""
    for name, value in vars(old).items():
        if name not in _OF_ANY_MODULE and name not in ("gate", "forward", "_packed"):
            vars(new).setdefault(name, value)
    for name in _HOOKS if hooks else ():
        vars(new)[name] = vars(old)[name]


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
    """input with K channels -> ``size`` channels along ``axis``: the input at ``index``, constants elsewhere.

    Args:
        index: int64 (K,).
        fill: what the result is where the input has no channel: shape (1, ...) with ``size`` at ``axis`` and
            otherwise as the input, or 1.
        axis: the channels' dimension.
    """

    index: Tensor
    fill: Tensor

    def __init__(self, index: Tensor, fill: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("fill", fill)
        self.axis = axis

    def forward(self, input: Tensor) -> Tensor:
        """Put the input among the constants."""
        axis = self.axis % self.fill.dim()
        shape = [self.fill.shape[d] if d == axis else input.shape[d] for d in range(self.fill.dim())]
        return self.fill.to(input.dtype).expand(shape).index_copy(axis, self.index, input)

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"channels={self.index.numel()} of {self.fill.shape[self.axis]}, axis={self.axis}"


class Framed(nn.Sequential):
    """A layer of a compact model with the small modules around it: gather, layer, pick, scatter or zeros.

    Attributes that it does not have are those of the layer, but for the statistics of a norm: what reads these, such as
    code that fuses a norm into a convolution, would leave out what is around it.
    """

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the modules one after the other; the layer gets the other arguments, such as an output size."""
        for name, module in self.named_children():
            input = module(input, *args, **kwargs) if name == "layer" else module(input)
        return input

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("gather", "layer", "pick", "scatter", "zeros") or name.startswith("__"):
                raise  # a copy is of the frame, and not of the layer alone
            layer = super().__getattr__("layer")
            if name in ("running_mean", "running_var") and hasattr(layer, name):
                raise AttributeError(
                    f"{name} is that of a {type(layer).__name__} with modules around it, which fusing it into a "
                    f"convolution would lose; fuse norms before gate_model, or run the network by gatedconv.Engine"
                ) from None
            return getattr(layer, name)


class Zeros(nn.Module):
    """input -> zeros of its shape: what is left of a closed branch."""

    def forward(self, input: Tensor) -> Tensor:
        """Forget the input."""
        return torch.zeros_like(input)


class EmptyMap(nn.Module):
    """input (N, C, H, W) -> zeros (N, channels, H', W'): what is left of a convolution whose outputs are not needed.

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

    def forward(self, input: Tensor) -> Tensor:
        """Work out the size."""
        height, width = (
            (input.shape[2 + d] + 2 * self.padding[d] - self.dilation[d] * (self.kernel_size[d] - 1) - 1)
            // self.stride[d]
            + 1
            for d in (0, 1)
        )
        return input.new_zeros((input.shape[0], self.channels, height, width))


class GatherChannels(nn.Module):
    """input (N, C, H, W) -> input[:, index] (N, K, H, W); the channels may be along another ``axis``.

    Args:
        index: int64 (K,).
        axis: the channels' dimension.
        size: C; needed where it follows from the size of an image, as of a flattened map: another one is an error.
    """

    index: Tensor

    def __init__(self, index: Tensor, axis: int = 1, size: int | None = None) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.axis, self.size = axis, size

    def forward(self, input: Tensor) -> Tensor:
        """Select the channels; RuntimeError for another number of them."""
        if self.size is not None:
            input = input.unflatten(self.axis, (self.size,))  # a check that torch.fx takes, too
        return input.index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"channels={self.index.numel()}"


class ScatterAdd(nn.Module):
    """(stream (N, C, H, W), part (N, K, H, W)) -> stream with ``part`` added at channels ``index``.

    The channels may be along another ``axis``.
    """

    index: Tensor

    def __init__(self, index: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.axis = axis

    def forward(self, stream: Tensor, part: Tensor) -> Tensor:
        """Add the part into the stream's channels."""
        return stream.index_add(self.axis, self.index, part)

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"channels={self.index.numel()}"


class ChannelBias(nn.Module):
    """x (N, C, H, W) -> x + bias[c]: what is left of a branch whose inner channels are all closed."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Add the constant."""
        return x + self.bias[:, None, None]


class ConstantMap(nn.Module):
    """x (N, C, H, W) -> (1, K, ceil(H / stride), ceil(W / stride)), a constant per channel.

    One image long, whatever N is: what follows does not depend on the input and broadcasts.
    """

    def __init__(self, value: Tensor, stride: int) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Spread the constant over the map."""
        height, width = -(-x.shape[2] // self.stride), -(-x.shape[3] // self.stride)
        return self.value[None, :, None, None].expand(1, -1, height, width)

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"channels={self.value.numel()}, stride={self.stride}"


class CompactBlock(nn.Module):
    """A compact residual block; shapes and layout as the block that it replaces.

    ``downsample`` is None for an identity shortcut and ``branch`` is None where nothing of the branch is
    left; ``scatter`` has the places of the branch's channels when only some of them are left.
    """

    def __init__(self, downsample: nn.Module | None, branch: nn.Module | None, scatter: Tensor | None) -> None:
        super().__init__()
        self.downsample = downsample
        self.branch = branch
        self.scatter = None if scatter is None else ScatterAdd(scatter)
        self.relu = nn.ReLU(inplace=True)

    @property
    def is_identity(self) -> bool:
        """Whether only the final ReLU is left."""
        return self.downsample is None and self.branch is None

    def forward(self, x: Tensor) -> Tensor:
        """Run what is left: x (N, C_in, H, W) -> (N, C_out, H', W')."""
        out = x if self.downsample is None else self.downsample(x)
        if self.branch is not None:
            part = self.branch(x)
            out = out + part if self.scatter is None else self.scatter(out, part)
        # Out of place where the shortcut is the input itself: the caller still holds it.
        return self.relu(out) if out is not x else torch.relu(out)
