"""What a frozen block becomes by compacting: plain modules and constant indices."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatherChannels(nn.Module):
    """x (N, C, H, W) -> x[:, index] (N, K, H, W); the channels may lie along another ``axis``."""

    index: Tensor

    def __init__(self, index: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Select the channels."""
        return x.index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"channels={self.index.numel()}"


class ScatterAdd(nn.Module):
    """(stream (N, C, H, W), part (N, K, H, W)) -> stream with ``part`` added at channels ``index``.

    The channels may lie along another ``axis``.
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
    """A residual block after the cut; shapes and layout as the block that it replaces.

    ``downsample`` is None for an identity shortcut and ``branch`` is None where nothing of the branch is
    left; ``scatter`` says where the branch's channels go when only some of them are left.
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
