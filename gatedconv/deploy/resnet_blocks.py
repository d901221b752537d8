"""The compact form of our own blocks: a residual block, and a group of `cifar_vgg`.

`shrink` makes layers smaller in the places where a model's own code calls them, and gives that code every channel that
it expects. The code of these two blocks is ours, so they are replaced: a `CompactBlock`, whose names are those of saved
files, takes a residual block's place. It adds the remaining channels to the stream in one step, and disappears
where its gates closed everything. Both ways remove channels by `slicing`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from gatedconv.convert.install import hooks_of
from gatedconv.deploy.slicing import filled_up, plain_conv, set_weight, slice_numbers, zero_channels
from gatedconv.gating import FrozenGate
from gatedconv.models import ResNet, VGGGroup
from gatedconv.nn import BasicBlock, ChannelBias, CompactBlock, ConstantMap, GatherChannels


@torch.no_grad()
def compact_our_blocks(model: nn.Module, channel_multiple: int) -> None:
    """Replace every block of ours in a frozen model, which is in eval mode, by its compact form; in place.

    Blocks that ``gate_model`` put its hooks on are left: their layers become smaller as those of any other model.
    """
    for name, block in list(model.named_modules()):
        if any(map(hooks_of, block.modules())):
            continue
        if isinstance(block, BasicBlock):
            small: nn.Module = compact_block(block, channel_multiple)
            if isinstance(model, ResNet) and small.is_identity:
                small = nn.Identity()  # our ResNets' stream comes out of a ReLU: another one changes nothing
            model.set_submodule(name, small)
        elif isinstance(block, VGGGroup) and block.channel_gate is not None:
            _compact_group(block, channel_multiple)


def compact_block(block: BasicBlock, channel_multiple: int = 1) -> CompactBlock:
    """One residual block without its closed part, but for the channels that fill its width up."""
    layer, channel = block.layer_gate, block.channel_gate
    mask = channel.mask if channel is not None else None
    position = block.position if mask is not None and not bool(mask.all()) else None
    if isinstance(layer, FrozenGate) and not layer.is_open:
        return CompactBlock(block.downsample, None, None)
    if position is None or mask is None:
        return CompactBlock(block.downsample, _branch(block), None)
    if not bool(mask.any()):
        return _closed_block(block)
    kept = filled_up(mask, channel_multiple)
    index = kept.nonzero().flatten()
    if position == "after":
        steps = {"conv2": _conv(block.conv2, write=kept), "bn2": _norm(block.bn2, kept, mask)}
        return CompactBlock(block.downsample, _branch(block, **steps), index)
    if position == "middle":
        first = {"conv1": _conv(block.conv1, write=kept), "bn1": _norm(block.bn1, kept, mask)}
        return CompactBlock(block.downsample, _branch(block, **first, conv2=_conv(block.conv2, read=kept)), None)
    conv1 = _conv(block.conv1, read=kept)
    conv1.weight[:, ~mask[kept]] = 0
    return CompactBlock(block.downsample, _branch(block, gather=GatherChannels(index), conv1=conv1), None)


def _closed_block(block: BasicBlock) -> CompactBlock:
    """A block whose channel gate is all closed: it adds the constants that its norms make to the stream."""
    if block.position == "after":
        return CompactBlock(block.downsample, None, None)
    if block.position == "middle":  # conv2 sees zeros, so bn2 sees zeros
        steps = {"shortcut": block.downsample, "bias": ChannelBias(_of_zeros(block.bn2))}
        return CompactBlock(_sequence(**steps), None, None)
    # conv1 sees zeros; what bn1 makes of them is constant, but conv2's padding then shows at the border.
    constant = ConstantMap(torch.relu(_of_zeros(block.bn1)), block.conv1.stride[0])
    steps = {"constant": constant, "conv2": _conv(block.conv2), "bn2": block.bn2}
    return CompactBlock(block.downsample, _sequence(**steps), None)


def _compact_group(group: VGGGroup, channel_multiple: int) -> None:
    """Remove the closed channels of a group, in place, and its gate.

    Where all are closed one channel stays, all zeros. Each activation maps 0 to 0.
    """
    gate = group.channel_gate
    assert isinstance(gate, FrozenGate)
    mask = gate.mask
    kept = filled_up(mask, channel_multiple)
    kept[0] |= not gate.is_open
    set_weight(group.conv1, group.conv1.weight[kept])
    set_weight(group.conv2, group.conv2.weight[:, kept])
    group.norm1, group.channel_gate = _norm(group.norm1, kept, mask), None


def _branch(block: BasicBlock, **changed: nn.Module) -> nn.Sequential:
    """The residual branch as named steps, with some of them changed."""
    steps = {"gather": None, "conv1": _conv(block.conv1), "bn1": block.bn1, "relu": nn.ReLU(inplace=True)}
    return _sequence(**steps | {"conv2": _conv(block.conv2), "bn2": block.bn2} | changed)


def _sequence(**steps: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, step) for name, step in steps.items() if step is not None))


def _conv(conv: nn.Conv2d, *, read: Tensor | None = None, write: Tensor | None = None) -> nn.Conv2d:
    """A torch.nn.Conv2d of its own with some of the inputs and outputs of one, bool (C_in,) and (C_out,)."""
    small, weight = plain_conv(conv), conv.weight
    weight = weight if write is None else weight[write]
    set_weight(small, weight if read is None else weight[:, read])
    return small


def _norm(norm: nn.BatchNorm2d, kept: Tensor, mask: Tensor) -> nn.BatchNorm2d:
    """The norm of some channels; those that ``mask`` closes become zeros."""
    small = copy.deepcopy(norm)
    zero_channels(small, kept & ~mask)
    slice_numbers(small, kept)
    return small


def _of_zeros(norm: nn.BatchNorm2d) -> Tensor:
    """The output (C,) of a norm in eval mode for zeros, one value for each channel."""
    values: Tensor = norm(norm.weight.new_zeros(1, norm.num_features, 1, 1))
    return values.flatten()
