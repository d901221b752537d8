"""Modules: the drop-in convolution, the gated residual block, and the small modules that compacting leaves."""

from gatedconv.nn.block import BasicBlock, PadShortcut
from gatedconv.nn.conv import Conv2d
from gatedconv.nn.graph_net import GraphNet
from gatedconv.nn.modules import (
    ChannelBias,
    CompactBlock,
    ConstantMap,
    EmptyMap,
    Framed,
    FrozenConv2d,
    GatherChannels,
    ScatterAdd,
    ScatterChannels,
    Zeros,
)

__all__ = [
    "BasicBlock",
    "ChannelBias",
    "CompactBlock",
    "Conv2d",
    "ConstantMap",
    "EmptyMap",
    "Framed",
    "FrozenConv2d",
    "GatherChannels",
    "GraphNet",
    "PadShortcut",
    "ScatterAdd",
    "ScatterChannels",
    "Zeros",
]
