"""Modules: the drop-in convolution, the gated residual block, and the small modules that compacting leaves."""

from gatedconv.nn.block import BasicBlock
from gatedconv.nn.compact_block import ChannelBias, CompactBlock, ConstantMap, GatherChannels, ScatterAdd
from gatedconv.nn.conv import Conv2d
from gatedconv.nn.graph_net import GraphNet
from gatedconv.nn.modules import (
    EmptyMap,
    Framed,
    FrozenConv2d,
    ScatterChannels,
)
from gatedconv.nn.shortcut import PadShortcut

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
]
