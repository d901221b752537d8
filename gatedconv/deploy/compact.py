"""Compacting: a frozen model becomes a smaller one that computes the same numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.convert import ConversionError, require_same
from gatedconv.convert.channels import Channels, Masks
from gatedconv.convert.flow import Flow
from gatedconv.convert.install import (
    DecideBranch,
    GateBranch,
    GateInput,
    SelectSamples,
    hooks_of,
    mask_of,
    masks_by_link,
    remove_gates,
)
from gatedconv.convert.record import Node, Record, Value, is_computed, record
from gatedconv.convert.verify import as_inputs, tensors_of
from gatedconv.deploy.shrink import CannotSlice, shrink
from gatedconv.gating import FrozenGate, copied, find_gates, unwrap
from gatedconv.models import ResNet, VGGGroup
from gatedconv.nn import BasicBlock, ChannelBias, CompactBlock, ConstantMap, Conv2d, FrozenConv2d, GatherChannels
from gatedconv.nn.graph_net import require_size

CARE = 3  # attempts, each of which lets the model's code see fewer tensors of fewer channels


def compact(
    frozen: nn.Module, example_input: Any, *, channel_multiple: int | None = None, verify: bool = True
) -> nn.Module:
    """A copy without gates, and without what they closed; the outputs in eval are those of ``frozen``.

    Every model keeps its class and its code. Convolutions, dense layers and norms become smaller in their places.
    Where the code around a layer expects all channels (a residual stream, a tensor that is split), small modules of
    ``gatedconv.nn`` choose and scatter them (``GatherChannels``, ``ScatterChannels``), or put the constants in
    that closed channels leave. What is shared stays shared, and what is not proven is not removed: layers that
    are called several times, whose weights are computed or read by other code keep their channels.

    Args:
        frozen: the result of ``freeze``.
        example_input: (N, C, H, W) that the model accepts, or a tuple of positional or a dict of keyword arguments.
        channel_multiple: keep so many closed channels, as zeros, that the width behind each gate is a multiple of
            this. None: 8 where ``example_input`` is on a GPU, whose matrix units need it, else 1.
        verify: compare the result with ``frozen`` on the example, a larger batch and larger images; costs three
            forwards of each.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for a model whose gates are not frozen, or that does not run on ``example_input``.
        ConversionError: the result would not compute what ``frozen`` does.
    """
    channel_multiple = _check(frozen, example_input, channel_multiple)
    model = copied(frozen).eval()
    _compact_our_blocks(model, channel_multiple)
    if isinstance(example_input, Tensor):
        require_size(model, example_input)
    if find_gates(model):
        result = _compact_rest(model, frozen, example_input, channel_multiple, verify)
    else:  # one of our networks: its blocks know how they shrink
        result = model
        if verify:
            require_same(unwrap(frozen), result, example_input, "compact")
    for attribute in ("mac_terms", "conversion"):
        vars(result).pop(attribute, None)
    if isinstance(example_input, Tensor):
        vars(result)["input_size"] = tuple(example_input.shape[1:])
    consensus = getattr(frozen, "consensus", None)
    if consensus is not None:  # a state dict may have moved the masks since the vote
        masks = {name: gate.mask for name, gate in find_gates(frozen).items() if isinstance(gate, FrozenGate)}
        vars(result)["consensus"] = replace(consensus, masks=masks or consensus.masks)
    if channel_multiple > 1:
        vars(result)["channel_multiple"] = channel_multiple
    return result.train(frozen.training)


def _check(frozen: Any, example_input: Any, channel_multiple: int | None) -> int:
    if not isinstance(frozen, nn.Module):
        raise TypeError(f"compact: the model must be a torch.nn.Module, got {type(frozen).__name__}")
    if not isinstance(example_input, (tuple, list, Mapping)):
        if not isinstance(example_input, Tensor) or example_input.dim() not in (4, 5):
            kind = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
            raise TypeError(f"compact: example_input must be a tensor (N, C, H, W), got {kind}")
        if not example_input.is_floating_point() or example_input.is_meta:
            kind = f"{example_input.dtype} on {example_input.device}"
            raise TypeError(f"compact: example_input must be of a floating-point type and hold data, got {kind}")
    if not tensors_of(as_inputs(example_input)):
        raise TypeError(f"compact: example_input must be a tensor or hold tensors, got {example_input!r}")
    if channel_multiple is None:
        channel_multiple = 8 if any(t.is_cuda for t in tensors_of(as_inputs(example_input))) else 1
    if isinstance(channel_multiple, bool) or not isinstance(channel_multiple, int) or channel_multiple < 1:
        raise ValueError(f"compact: channel_multiple must be a positive int, got {channel_multiple!r}")
    learning = [name for name, gate in find_gates(frozen).items() if not isinstance(gate, FrozenGate)]
    if learning:
        raise ValueError(f"compact: freeze the model first; gate {learning[0]!r} is still learning")
    return channel_multiple


def _compact_our_blocks(model: nn.Module, channel_multiple: int) -> None:
    for name, block in list(model.named_modules()):
        if isinstance(block, BasicBlock):
            small: nn.Module = compact_block(block, channel_multiple)
            if isinstance(model, ResNet) and small.is_identity:
                small = nn.Identity()  # our ResNets' stream comes out of a ReLU: another one changes nothing
            model.set_submodule(name, small)
        elif isinstance(block, VGGGroup) and block.channel_gate is not None:
            block.compact()


def _compact_rest(
    model: nn.Module, frozen: nn.Module, example_input: Any, channel_multiple: int, verify: bool
) -> nn.Module:
    """Any other model: make layers smaller where they are; with more care where an attempt fails."""
    closed = _closed(model)
    remove_gates(model)
    _plain_convolutions(model)
    found = _recorded(model, example_input)
    flow = Flow(found)
    _round_up(model, closed, channel_multiple)
    masks = _masks(flow, closed)
    unsliceable: set[str] = set()
    care = 0
    while True:
        result = copied(model)
        try:
            shrink(result, Channels(flow, masks, care, unsliceable))
            if verify:
                require_same(unwrap(frozen), result, example_input, "compact")
            return result
        except CannotSlice as failure:
            unsliceable.add(failure.path)
        except ConversionError:
            care += 1
            if care == CARE:
                raise


def _closed(model: nn.Module) -> list[tuple[str, type, Tensor]]:
    """Path of each module that frozen gates multiply at, the kind of its hook, and the mask."""
    links = masks_by_link(model)
    found: list[tuple[str, type, Tensor]] = []
    for path, module in model.named_modules():
        for hook in hooks_of(module):
            mask = mask_of(hook, module, links)
            if mask is not None and not isinstance(hook, (DecideBranch, SelectSamples)):
                found.append((path, type(hook), mask.cpu()))
        if isinstance(module, Conv2d) and isinstance(module.gate, FrozenGate):
            found.append((path, Conv2d, module.gate.mask.cpu()))
    return found


@torch.no_grad()
def _round_up(model: nn.Module, closed: list[tuple[str, type, Tensor]], channel_multiple: int) -> None:
    """Keep some closed channels, as zeros that their norm or convolution makes; changes model and masks in place."""
    for index, (path, kind, mask) in enumerate(closed):
        module = model.get_submodule(path)
        surplus = -int(mask.sum()) % channel_multiple
        layer = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Conv2d)) and module.weight is not None
        if not layer or not surplus or not bool(mask.any()) or kind in (GateBranch, GateInput) or is_computed(module):
            continue
        kept = (~mask).nonzero().flatten()[:surplus]
        for name in ("weight", "bias"):
            parameter = getattr(module, name)
            if parameter is not None:
                changed = parameter.detach().clone()
                changed[kept.to(changed.device)] = 0
                setattr(module, name, nn.Parameter(changed, parameter.requires_grad))
        closed[index] = (path, kind, mask.index_fill(0, kept, True))


def _plain_convolutions(model: nn.Module) -> None:
    """Our convolutions become torch.nn's own, with the same parameters."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FrozenConv2d) or (isinstance(module, Conv2d) and isinstance(module.gate, FrozenGate)):
            model.set_submodule(path, plain_conv(module))


def plain_conv(module: nn.Conv2d) -> nn.Conv2d:
    """A ``torch.nn.Conv2d`` that shares the parameters, hooks and children of a convolution of ours."""
    geometry: tuple[Any, Any, Any, Any] = (module.kernel_size, module.stride, module.padding, module.dilation)
    plain = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        *geometry,
        module.groups,
        bias=False,
        padding_mode=module.padding_mode,
        device="meta",
    )
    plain.weight, plain.bias = module.weight, module.bias
    plain._forward_hooks, plain._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
    plain._modules.update({name: child for name, child in module._modules.items() if name != "gate"})
    return plain.train(module.training)


def _recorded(model: nn.Module, example_input: Any) -> Record:
    args, kwargs = as_inputs(example_input)
    if isinstance(example_input, Tensor) and len(example_input) < 2:
        image = example_input if len(example_input) else example_input.new_zeros(1, *example_input.shape[1:])
        try:
            return record(model, (torch.cat([image, image]),))
        except Exception:  # a model for single images
            pass
    try:
        return record(model, args, kwargs)
    except Exception as error:  # whatever the layers raise
        what = ", ".join(f"{tuple(t.shape)}, {t.dtype}, on {t.device}" for t in tensors_of((args, kwargs)))
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"compact: the model does not run on example_input ({what}): {why}") from error


def _masks(flow: Flow, closed: list[tuple[str, type, Tensor]]) -> Masks:
    values: dict[Value, Tensor] = {}
    inputs: dict[tuple[Node, Value], Tensor] = {}
    paths: dict[Value, str] = {}
    for path, kind, mask in closed:
        calls = flow.record.calls_of(path)
        if not calls or not flow.has_channels((calls[0].inputs if kind is GateInput else calls[0].outputs)[0]):
            continue
        if kind is GateInput:
            node = next(n for n in calls[0].inputs[0].users if n.scope == path)
            inputs[node, calls[0].inputs[0]] = mask
            continue
        value = calls[0].outputs[0]
        if kind is GateBranch:
            if bool(mask.all()):
                continue
            mask = mask.expand(flow[value].size)
        values[value] = values[value] & mask if value in values else mask
        paths[value] = path
    return Masks(values, inputs, paths)


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
