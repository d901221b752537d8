"""Cutting: a frozen model becomes a smaller plain one that computes the same numbers."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import canonicalize
from gatedconv.convert.computed import settle_weights
from gatedconv.convert.trace import TraceFailure, evaluate_shapes, quiet, trace
from gatedconv.deploy.cut import cut_graph
from gatedconv.gating import FrozenGate, find_gates, unwrap
from gatedconv.models import ResNet
from gatedconv.nn import BasicBlock, ChannelBias, CompactBlock, ConstantMap, GatherChannels, GraphNet
from gatedconv.nn.graph_net import require_size


def compact(frozen: nn.Module, example_input: Tensor, *, channel_multiple: int | None = None) -> nn.Module:
    """A copy without gates, and without what they closed; the outputs in eval are those of ``frozen``.

    A closed layer leaves its shortcut; closed channels leave the convolutions on both their sides, and
    what is left of a branch is added into the channels that it belongs to. A branch whose inner channels
    are all closed leaves the constant that its last norm makes of zeros.

    Our ResNets stay ResNets. Any other network becomes a ``torch.fx.GraphModule`` of torch.nn modules and a
    few tiny ones of ``gatedconv.nn`` (``ScatterAdd``, ``GatherChannels``, ...). Where it is not proven that a
    channel can go, it is computed, or its constant is put back. A network that cannot be traced keeps its
    frozen layers, with a warning.

    Args:
        frozen: the result of ``freeze``.
        example_input: (N, C, H, W) that the model accepts. Where all that a layer reads is closed, its constant is
            worked out for images of this height and width. Where such a constant depends on the size, the result has
            the attribute ``fixed_size``, (H, W), and raises ValueError for images of another one.
        channel_multiple: keep so many closed channels, as zeros, that the width behind each gate is a multiple of
            this. None: 8 where ``example_input`` is on a GPU, whose matrix units need it, else 1.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for a model whose gates are not frozen, or that does not run on ``example_input``.
    """
    if not isinstance(frozen, nn.Module):
        raise TypeError(f"compact: the model must be a torch.nn.Module, got {type(frozen).__name__}")
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        kind = str(tuple(example_input.shape)) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise TypeError(f"compact: example_input must be a tensor (N, C, H, W), got {kind}")
    if not example_input.is_floating_point() or example_input.is_meta:
        kind = f"{example_input.dtype} on {example_input.device}"
        raise TypeError(f"compact: example_input must be of a floating-point type and hold data, got {kind}")
    if channel_multiple is None:
        channel_multiple = 8 if example_input.is_cuda else 1
    if isinstance(channel_multiple, bool) or not isinstance(channel_multiple, int) or channel_multiple < 1:
        raise ValueError(f"compact: channel_multiple must be a positive int, got {channel_multiple!r}")
    learning = [name for name, gate in find_gates(frozen).items() if not isinstance(gate, FrozenGate)]
    if learning:
        raise ValueError(f"compact: freeze the model first; gate {learning[0]!r} is still learning")
    model = copy.deepcopy(unwrap(frozen))
    settle_weights(model)
    _cut_our_blocks(model, channel_multiple)
    require_size(model, example_input)
    result = _cut_rest(model, example_input, channel_multiple) if find_gates(model) else model
    for attribute in ("mac_terms", "conversion"):
        if hasattr(result, attribute):
            delattr(result, attribute)
    if "fixed_size" in vars(model):
        vars(result)["fixed_size"] = vars(model)["fixed_size"]
    consensus = getattr(frozen, "consensus", None)
    if consensus is not None:  # a state dict may have moved the masks since the vote
        masks = {name: gate.mask for name, gate in find_gates(frozen).items() if isinstance(gate, FrozenGate)}
        vars(result)["consensus"] = replace(consensus, masks=masks or consensus.masks)
    if channel_multiple > 1:
        vars(result)["channel_multiple"] = channel_multiple
    return result.train(frozen.training)


def _cut_our_blocks(model: nn.Module, channel_multiple: int) -> None:
    for name, block in list(model.named_modules()):
        if isinstance(block, BasicBlock):
            small: nn.Module = compact_block(block, channel_multiple)
            if isinstance(model, ResNet) and small.is_identity:
                small = nn.Identity()  # our ResNets' stream comes out of a ReLU: another one changes nothing
            model.set_submodule(name, small)


def _cut_rest(model: nn.Module, example_input: Tensor, channel_multiple: int) -> nn.Module:
    """The general cut, on the CPU; a model without a graph keeps its frozen gates, which skip what is closed."""
    device = example_input.device
    example = example_input.detach().cpu()
    model = model.cpu().eval()
    try:
        graph_module = fx.GraphModule(model, model.graph) if isinstance(model, GraphNet) else trace(model, example)[0]
    except TraceFailure as failure:
        warnings.warn(f"compact: the model keeps its frozen layers, it cannot be traced: {failure}", stacklevel=3)
        return model.to(device)
    canonicalize(graph_module, model)
    _require_runs(graph_module, example_input, example)
    return cut_graph(graph_module, example, channel_multiple, type(model).__name__).to(device)


def _require_runs(graph_module: fx.GraphModule, given: Tensor, example: Tensor) -> None:
    try:
        with quiet():
            evaluate_shapes(graph_module, example)
    except Exception as error:  # whatever the layers raise
        what = f"{tuple(given.shape)}, {given.dtype}, on {given.device}"
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"compact: the model does not run on example_input ({what}): {why}") from error


def compact_block(block: BasicBlock, channel_multiple: int = 1) -> CompactBlock:
    """One residual block without its closed part, but for the channels that fill its width up."""
    layer, channel = block.layer_gate, block.channel_gate
    mask = channel.mask if channel is not None else None
    closed = isinstance(layer, FrozenGate) and not layer.is_open
    if closed or (mask is not None and block.position == "after" and not mask.any()):
        return CompactBlock(block.downsample, None, None)
    if mask is None or bool(mask.all()):
        return CompactBlock(
            block.downsample,
            _sequence(conv1=block.conv1, bn1=block.bn1, relu=nn.ReLU(inplace=True), conv2=block.conv2, bn2=block.bn2),
            None,
        )
    index = _rounded(mask, channel_multiple)
    filling = ~mask[index]
    if block.position == "after":
        branch = _sequence(
            conv1=block.conv1,
            bn1=block.bn1,
            relu=nn.ReLU(inplace=True),
            conv2=_cut_conv(block.conv2, out=index),
            bn2=_cut_norm(block.bn2, index, filling),
        )
        return CompactBlock(block.downsample, branch, index)
    cut = _cut_middle if block.position == "middle" else _cut_before
    return cut(block, index, filling)


def _rounded(mask: Tensor, channel_multiple: int) -> Tensor:
    """Int64, ascending: the open channels and, to a multiple where there are any, the first closed ones."""
    kept = mask.clone()
    if mask.any():
        kept[(~mask).nonzero().flatten()[: -int(mask.sum()) % channel_multiple]] = True
    return kept.nonzero().flatten()


def _cut_middle(block: BasicBlock, index: Tensor, filling: Tensor) -> CompactBlock:
    if index.numel() == 0:
        # conv2 sees zeros, so bn2 sees zeros: a constant for each channel is all that the branch adds.
        constant = _norm_of_zero(block.bn2)
        return CompactBlock(_sequence(shortcut=block.downsample, bias=ChannelBias(constant)), None, None)
    branch = _sequence(
        conv1=_cut_conv(block.conv1, out=index),
        bn1=_cut_norm(block.bn1, index, filling),
        relu=nn.ReLU(inplace=True),
        conv2=_cut_conv(block.conv2, into=index),
        bn2=block.bn2,
    )
    return CompactBlock(block.downsample, branch, None)


def _cut_before(block: BasicBlock, index: Tensor, filling: Tensor) -> CompactBlock:
    if index.numel() == 0:
        # conv1 sees zeros; what bn1 makes of them is constant, but conv2's padding then shows at the border.
        start: dict[str, nn.Module] = {
            "constant": ConstantMap(torch.relu(_norm_of_zero(block.bn1)), block.conv1.stride[0])
        }
    else:
        conv1 = _cut_conv(block.conv1, into=index)
        conv1.weight.data[:, filling] = 0
        start = {
            "gather": GatherChannels(index),
            "conv1": conv1,
            "bn1": block.bn1,
            "relu": nn.ReLU(inplace=True),
        }
    return CompactBlock(block.downsample, _sequence(**start, conv2=block.conv2, bn2=block.bn2), None)


def _sequence(**layers: nn.Module | None) -> nn.Sequential:
    """A Sequential with named steps; our convolutions become torch.nn's own."""
    steps = ((name, layer) for name, layer in layers.items() if layer is not None)
    return nn.Sequential(OrderedDict((n, _cut_conv(m) if isinstance(m, nn.Conv2d) else m) for n, m in steps))


@torch.no_grad()
def _cut_conv(conv: nn.Conv2d, *, out: Tensor | None = None, into: Tensor | None = None) -> nn.Conv2d:
    """A torch.nn.Conv2d with the given outputs and inputs alone (groups = 1, no bias: a block's own)."""
    weight = conv.weight if out is None else conv.weight.index_select(0, out)
    weight = weight if into is None else weight.index_select(1, into)
    geometry: tuple[Any, Any, Any] = (conv.kernel_size, conv.stride, conv.padding)
    result = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        *geometry,
        bias=False,
        device=weight.device,
        dtype=weight.dtype,
    )
    result.weight.copy_(weight)
    result.weight.requires_grad_(conv.weight.requires_grad)
    return result


@torch.no_grad()
def _cut_norm(norm: nn.BatchNorm2d, index: Tensor, filling: Tensor) -> nn.BatchNorm2d:
    """The norm of some channels; those of ``filling``, bool (len(index),), become zeros."""
    result = nn.BatchNorm2d(index.numel(), norm.eps, norm.momentum, device=norm.weight.device, dtype=norm.weight.dtype)
    for name, value in norm.state_dict().items():
        result.state_dict()[name].copy_(value.index_select(0, index) if value.dim() else value)
    result.weight[filling] = 0
    result.bias[filling] = 0
    return result


@torch.no_grad()
def _norm_of_zero(norm: nn.BatchNorm2d) -> Tensor:
    """What an eval-mode BatchNorm2d makes of zeros, one value for each channel (C,)."""
    zeros = norm.weight.new_zeros(1, norm.num_features, 1, 1)
    value: Tensor = torch.nn.functional.batch_norm(
        zeros, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    ).flatten()
    return value
