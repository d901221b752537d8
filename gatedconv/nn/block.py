"""The gated residual block: two 3x3 convolutions, a shortcut, and optional gates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv import ops
from gatedconv.gating import ChannelGate, FrozenGate, LayerGate
from gatedconv.gating.gates import Gate, LearnedGate
from gatedconv.nn.conv import Conv2d
from gatedconv.nn.skip import BlockSkip, decides_on_device, gated_input_branch, has_hooks, residual_branch, skip_branch

GATES = ("layer", "channel", "both")
POSITIONS = ("before", "middle", "after")


class PadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, new channels zero, half of them in front; no parameters (He et al. 2016).

    Shape: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """Numbers shown by repr()."""
        return f"stride={self.stride}, front={self.front}, back={self.back}"


def make_shortcut(in_channels: int, out_channels: int, stride: int, option: str) -> nn.Module | None:
    """None for an identity; else option "A" (padding) or "B" (1x1 convolution and BatchNorm)."""
    if stride == 1 and in_channels == out_channels:
        return None
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """out = ReLU(shortcut(x) + g_layer * branch(x)), branch = bn2(conv2(relu(bn1(conv1(x))))).

    A layer gate reads the block's input. A channel gate reads what it gates (Figure 5 of the paper):
    "before" the branch's input, the shortcut ungated; "middle" relu(bn1(conv1)); "after" bn2's output.
    Gates multiply after the norm, so a closed channel is an exact zero.

    In training every sample is computed and then multiplied, as in the paper, so that BatchNorm sees the
    whole batch. In eval the branch runs on the samples whose layer gate is open and on no other. With
    frozen gates nothing closed is computed in either mode.

    Attributes:
        skip: decides in training whether the branch is skipped; None, the default, for never.

    Shape: (N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride)).
    """

    layer_gate: Gate | None
    channel_gate: Gate | None

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: str = "B",
        position: str = "after",
        layer_gate: LayerGate | None = None,
        channel_gate: ChannelGate | None = None,
    ) -> None:
        super().__init__()
        self.position = position
        self.conv1 = Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = make_shortcut(in_channels, channels, stride, shortcut)
        self.layer_gate = layer_gate
        self.channel_gate = channel_gate
        self.skip: BlockSkip | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop what belongs to one training run."""
        return {**self.__dict__, "skip": None}

    def forward(
        self, x: Tensor, mean: Tensor | None = None, return_mean: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Run the block.

        Args:
            x: (N, in_channels, H, W).
            mean: (N, in_channels), the mean of x over H and W if the block before has computed it; the gates then do
                not read x again.
            return_mean: return (output, its mean over H and W), the mean None where no kernel computes it on the way.

        Returns:
            (N, channels, H', W').
        """
        if self.training:
            norm = self._end_norm() if ops.kernels_run_on(x) and self._learns_at_its_end() else None
            if norm is not None:
                out, mean = self._fused_end(x, mean, norm)
                return (out, mean) if return_mean else out
        out = self._run(x)
        return (out, None) if return_mean else out

    def _run(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        gate = self.layer_gate
        if gate is None or (isinstance(gate, FrozenGate) and gate.is_open):
            return self._open_block(x, shortcut)
        if isinstance(gate, FrozenGate):
            return self._activated(shortcut)
        decision = gate(x)[:, :, None, None]
        if self.training and self.skip is not None and self.skip.applies(gate):
            return skip_branch(shortcut, self)
        if self.training or torch.compiler.is_compiling():  # a graph needs shapes that do not depend on data
            return self.relu(shortcut + decision * self.branch(x))
        convs = (self.conv1, self.bn1), (self.conv2, self.bn2)
        if self.channel_gate is None and self._has_plain_relu() and decides_on_device(x, *convs):
            return residual_branch(x, shortcut, decision.flatten() > 0, *convs)
        index = decision.flatten().nonzero().flatten()
        if index.numel() == 0:
            return self._activated(shortcut)
        part = decision.index_select(0, index) * self.branch(x.index_select(0, index))
        return self.relu(shortcut.index_add(0, index, part))

    def _open_block(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """The block for samples that are all open: (N, in_channels, H, W) -> (N, channels, H', W')."""
        channel, convs = self.channel_gate, ((self.conv1, self.bn1), (self.conv2, self.bn2))
        if isinstance(channel, LearnedGate) and self.position != "after" and not self.training:
            if not torch.compiler.is_compiling() and self._has_plain_relu() and decides_on_device(x, *convs):
                return gated_input_branch(x, shortcut, channel, self.position, *convs)
        return self.relu(shortcut + self.branch(x))

    def _activated(self, shortcut: Tensor) -> Tensor:
        """The end of a block whose branch adds nothing; not in place: an identity shortcut is the caller's tensor."""
        return torch.relu(shortcut) if self._has_plain_relu() else self.relu(shortcut.clone())

    def _has_plain_relu(self) -> bool:
        return type(self.relu) is nn.ReLU and not has_hooks(self.relu)

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, channel gate included: (N, in_channels, H, W) -> (N, channels, H', W')."""
        mask = self.channel_gate.mask if self.channel_gate is not None else None
        if mask is not None:
            return self._frozen_branch(x, mask)
        return self._gated(self.bn2(self._convolved(x)), "after")

    def _convolved(self, x: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The branch up to conv2."""
        x = self._gated(x, "before", pooled)
        return self.conv2(self._gated(self.relu(self.bn1(self.conv1(x))), "middle"))

    def _gated(self, x: Tensor, position: str, pooled: Tensor | None = None) -> Tensor:
        if self.channel_gate is None or self.position != position:
            return x
        return ops.gated_scale(x, self.channel_gate(x, pooled))

    def _learns_at_its_end(self) -> bool:
        """Whether `ops.gated_residual` can take a learning gate together with norm, sum and ReLU."""
        channel = self.channel_gate
        if not all(gate is None or isinstance(gate, LearnedGate) for gate in (self.layer_gate, channel)):
            return False
        inner = channel is not None and self.position == "after"
        if isinstance(channel, LearnedGate) and inner and (channel.pool != "avg" or channel.synchronized):
            return False  # it reads every position of bn2's output, or the batches of other processes
        # What is not called on its own cannot call its hooks.
        fused = [self.bn2, self.relu] if channel is None or not inner else [self.bn2, self.relu, channel]
        hooked = any(has_hooks(module) for module in fused)
        return (self.layer_gate is not None or inner) and type(self.relu) is nn.ReLU and not hooked

    def _end_norm(self) -> ops.NormArguments | None:
        """The arguments of `ops.gated_residual` about bn2; None where it is another norm, or not learning."""
        norm = self.bn2
        mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
        if type(norm) is not nn.BatchNorm2d or not norm.training or not norm.affine or norm.momentum is None:
            return None
        if mean is None or var is None or batches is None:
            return None
        return ops.NormArguments(norm.weight, norm.bias, mean, var, batches, norm.eps, norm.momentum)

    def _fused_end(self, x: Tensor, pooled: Tensor | None, norm: ops.NormArguments) -> tuple[Tensor, Tensor | None]:
        """Run the block in training with bn2, gates, sum and ReLU as one operator; returns the output and its mean."""
        shortcut = x if self.downsample is None else self.downsample(x)
        layer = None if self.layer_gate is None else self.layer_gate(x, pooled)
        if self.layer_gate is not None and self.skip is not None and self.skip.applies(self.layer_gate):
            return skip_branch(shortcut, self), None
        branch = self._convolved(x, pooled)
        gate, inner = self.channel_gate, None
        if isinstance(gate, LearnedGate) and self.position == "after":
            inner = ops.InnerGate(*gate.arguments(branch.shape[0], branch.dtype))
        result = ops.gated_residual(branch, shortcut, norm, layer, inner)
        if result.channel is not None and isinstance(gate, LearnedGate):
            gate.note(result.channel)
        return result.out, result.pooled

    def _frozen_branch(self, x: Tensor, mask: Tensor) -> Tensor:
        """The branch with a constant mask: convolutions skip closed channels on both their sides."""
        before, middle, after = (mask if self.position == p else None for p in POSITIONS)
        h = self.conv1.masked_forward(x, middle, before)
        h = self.relu(self.bn1(h))
        y = self.bn2(self.conv2.masked_forward(h, after, middle))
        return y if after is None else y * after.to(y.dtype)[:, None, None]
