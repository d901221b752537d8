"""``gatedconv.Conv2d``: torch.nn.Conv2d with an optional gate on its output channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv import ops
from gatedconv.gating import ChannelGate, FrozenGate, Gate


class Conv2d(nn.Conv2d):
    """Drop-in for ``torch.nn.Conv2d``; with ``gate=None`` it is one in every respect.

    Args:
        gate: None; "channel" for a new ``ChannelGate(out_channels)``; or a ChannelGate of the user's
            with ``num_gates == out_channels``. The gate reads this layer's output and multiplies it, so
            a closed channel leaves as exact zeros, without bias. Once frozen, closed channels are not
            computed at all.

    The other arguments are torch.nn.Conv2d's. A norm placed after this layer sees the zeros and makes a
    constant of them.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H_out, W_out); an unbatched (C, H, W) input works
    without a gate only.

    Raises:
        TypeError, ValueError: another gate, or one of another number of channels; of the others as torch.nn.Conv2d.
    """

    gate: Gate | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        gate: str | ChannelGate | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.gate = _make_gate(gate, out_channels, device, dtype)
        self._packed = ops.PackedConv()

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, then gate: (N, in_channels, H, W) -> (N, out_channels, H_out, W_out)."""
        if self.gate is None:
            return super().forward(input)
        if input.dim() != 4:
            raise ValueError(f"Conv2d: a gated layer takes (N, C, H, W), got shape {tuple(input.shape)}")
        if isinstance(self.gate, FrozenGate):
            return self.masked_forward(input, self.gate.mask)
        out = super().forward(input)
        return ops.gated_scale(out, self.gate(out))

    def masked_forward(self, input: Tensor, out_open: Tensor | None, in_open: Tensor | None = None) -> Tensor:
        """The convolution restricted to open outputs and inputs; see ``gatedconv.ops.masked_conv2d``.

        None is a mask that is open everywhere. Without gradients the weights stay packed from call to call.
        """
        if out_open is None:
            if in_open is None:
                return super().forward(input)
            out_open = self._everything_open()
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return ops.masked_conv2d(
            input,
            self.weight,
            self.bias,
            out_open,
            in_open,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            packed=self._packed,
        )

    def _everything_open(self) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.ones(self.out_channels, dtype=torch.bool, device=self.weight.device)
        return self._packed.everything(self.out_channels, self.weight.device)

    def train(self, mode: bool = True) -> Conv2d:
        """Set the mode, and drop packed weights, which the replay of a CUDA graph makes stale."""
        self._packed.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Conv2d:
        self._packed.clear()
        super()._apply(fn, recurse)
        return self


def _make_gate(gate: str | Gate | None, out_channels: int, device: Any, dtype: Any) -> Gate | None:
    if gate is None:
        return None
    if gate == "channel":
        return ChannelGate(out_channels, device=device, dtype=dtype)
    if isinstance(gate, str):
        raise ValueError(f"Conv2d: gate must be None, 'channel' or a ChannelGate, got {gate!r}")
    if not isinstance(gate, ChannelGate):
        raise TypeError(f"Conv2d: gate must be None, 'channel' or a ChannelGate, got {type(gate).__name__}")
    if gate.num_gates != out_channels or gate.in_channels != out_channels:
        raise ValueError(
            f"Conv2d: the gate must read and gate the {out_channels} output channels, "
            f"got in_channels={gate.in_channels}, num_gates={gate.num_gates}"
        )
    return gate
