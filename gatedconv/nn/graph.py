"""Tiny modules of converted and cut networks, and the graph module that carries them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.gating import Gate, forget
from gatedconv.nn.conv import Conv2d

# What a converted network carries beside its graph and weights; torch.fx forgets such things when it copies.
_CARRIED = ("mac_terms", "conversion", "consensus", "input_size", "fixed_size")


class GraphNet(fx.GraphModule):
    """A ``torch.fx.GraphModule`` that keeps gatedconv's attributes, and gates that its graph no longer calls.

    ``fixed_size``, where there is one, is the (H, W) of the only images that its constants are right for; a call with
    others raises ValueError.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphNet") -> None:
        graph._tracer_cls = None  # a pickle is traced again, by torch.fx's own tracer
        super().__init__(root, graph, class_name)
        present = {name for name, _ in self.named_modules()}
        for name, module in root.named_modules():
            if isinstance(module, Gate) and name not in present:
                self.add_submodule(name, module)
        self.register_forward_pre_hook(_before_call)

    def _deepcopy_init(self) -> Any:
        return GraphNet.__init__

    def __reduce__(self) -> Any:
        build, state = super().__reduce__()
        return _unpickled, (build, *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphNet:
        result: GraphNet = super().__deepcopy__(memo)  # type: ignore[assignment]
        for name in _CARRIED:
            if name in self.__dict__:
                setattr(result, name, copy.deepcopy(self.__dict__[name], memo))
        result.training = self.training
        return result


def _unpickled(build: Any, *state: Any) -> nn.Module:
    model: nn.Module = build(*state)
    model.register_forward_pre_hook(_before_call)
    return model


def _before_call(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if model.training:
        forget(model)
    size = vars(model).get("fixed_size")
    if size is None or not args:
        return None
    if isinstance(args[0], fx.Proxy):  # a step of the graph that is traced
        return args[0].tracer.create_proxy("call_function", _of_size, (args[0], size), {}), *args[1:]
    return _of_size(args[0], size), *args[1:]


def require_size(model: nn.Module, x: Tensor) -> None:
    """Raise where a cut network's constants are not those of images like x (N, C, H, W).

    Raises:
        ValueError: naming both sizes.
    """
    size = vars(model).get("fixed_size")
    if size is not None:
        _of_size(x, size)


def _of_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return x."""
    if tuple(x.shape[2:]) != tuple(size):
        found = " x ".join(str(n) for n in x.shape[2:])
        raise ValueError(
            f"this network was cut for images of {size[0]} x {size[1]}, got {found}: constants that closed channels "
            f"left in it hold for that size alone; compact it with an example of the other size"
        )
    return x


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
