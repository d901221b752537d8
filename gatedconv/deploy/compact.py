"""Compacting: a frozen model becomes a smaller one that computes the same numbers.

Which channels each tensor loses, where sums and concatenations need the same ones of several layers, is solved in
``convert.channels``, on the dimensions that ``convert.flow`` found; here and in ``deploy.shrink`` layers are replaced.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.convert import Conversion, ConversionError, require_same
from gatedconv.convert.channels import Removal
from gatedconv.convert.constants import MOST_CAUTION, Masks
from gatedconv.convert.example import record_example, require_example
from gatedconv.convert.flow import Flow
from gatedconv.convert.install import (
    DecideBranch,
    GateBranch,
    GateInput,
    SelectSamples,
    hooks_of,
    keeping_aliases,
    mask_of,
    masks_by_link,
    over_channels,
    remove_gates,
)
from gatedconv.convert.module_kinds import CONVS, is_computed, weight_of
from gatedconv.convert.record import Node, Value
from gatedconv.convert.verify import as_inputs, tensors_of, trains
from gatedconv.deploy.resnet_blocks import compact_our_blocks
from gatedconv.deploy.shrink import CannotSlice, shrink
from gatedconv.deploy.slicing import filled_up, plain_conv, zero_channels
from gatedconv.gating import Consensus, FrozenGate, MacTerm, attribute_of, copied, find_gates, require_frozen, unwrap
from gatedconv.nn import Conv2d, FrozenConv2d
from gatedconv.nn.graph_net import require_size

_ZEROED = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, *CONVS)  # zero weights and biases make zeros


@torch.inference_mode(False)  # parameters that are made in inference mode cannot be trained
def compact(
    frozen: nn.Module, example_input: Any, *, channel_multiple: int | None = None, verify: bool = True
) -> nn.Module:
    """A copy without gates, and without what they closed; the outputs in eval are those of ``frozen``.

    Every model keeps its class and its code. Convolutions, dense layers and norms become smaller in their places.
    Where the code around a layer expects all channels (a residual stream, a tensor that is split), small modules of
    ``gatedconv.nn`` gather and scatter channels (``GatherChannels``, ``ScatterChannels``), or fill in the constants
    that closed channels produce. What is shared stays shared, and what is not proven is not removed: layers whose
    weights are computed or read by other code keep their channels. A layer that is called several times keeps what one
    of its calls needs.

    Args:
        frozen: the result of ``freeze``.
        example_input: images (N, C, H, W), clips (N, T, C, H, W) or vectors (N, K) that the model accepts, or a tuple
            of positional or a dict of keyword arguments.
        channel_multiple: keep so many closed channels, as zeros, that the width behind each gate is a multiple of
            this, where the gated module has weights to make the zeros. None: 8 where ``example_input`` is on a GPU,
            whose matrix units need it, else 1.
        verify: compare the result with ``frozen`` on the example, a larger batch and larger images, and try whether
            it runs in training where ``frozen`` does; costs three forwards of each, and one in training.

    Warns:
        UserWarning: the result runs in eval alone; or the model's code reads numbers of its tensors, so that for other
            inputs other layers may run than on the example.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for a model whose gates are not frozen, or that does not run on ``example_input``.
        ConversionError: the result would not compute what ``frozen`` does.
    """
    example_input, channel_multiple = _check(frozen, example_input, channel_multiple)
    model = copied(frozen)
    model.eval()  # a class with a train() of its own may return nothing from it
    compact_our_blocks(model, channel_multiple)
    if isinstance(example_input, Tensor):
        require_size(model, example_input)
    if find_gates(model):
        result = _compact_rest(model, frozen, example_input, channel_multiple, verify)
    else:  # one of our networks: its blocks have methods that shrink them
        result = model
        if verify:
            require_same(unwrap(frozen), result, example_input, "compact")
    if any(isinstance(term, MacTerm) for term in attribute_of(result, "mac_terms", list) or ()):
        del vars(result)["mac_terms"]
    if attribute_of(result, "conversion", Conversion):
        del vars(result)["conversion"]
    if isinstance(example_input, Tensor):
        vars(result)["gatedconv_size"] = tuple(example_input.shape)
    if consensus := current_consensus(frozen):
        vars(result)["consensus"] = consensus
    if channel_multiple > 1:
        vars(result)["gatedconv_multiple"] = channel_multiple
    _copy_modes(frozen, result)
    return result


def current_consensus(model: nn.Module) -> Consensus | None:
    """The consensus of a model with the masks of now: a state dict may have moved them since the vote."""
    consensus = attribute_of(model, "consensus", Consensus)
    masks = {name: gate.mask for name, gate in find_gates(model).items() if isinstance(gate, FrozenGate)}
    return replace(consensus, masks=masks) if consensus is not None and masks else consensus


def _copy_modes(frozen: nn.Module, result: nn.Module) -> None:
    """Put each module in the mode of its original; those that are new are in that of the module around them."""
    modes = {path: module.training for path, module in unwrap(frozen).named_modules()}
    for path, module in result.named_modules():  # a module comes before its children
        if module.training != modes.get(path, module.training):
            module.train(modes[path])


def _check(frozen: Any, example_input: Any, channel_multiple: int | None) -> tuple[Any, int]:
    if not isinstance(frozen, nn.Module):
        raise TypeError(f"compact: the model must be a torch.nn.Module, got {type(frozen).__name__}")
    example_input = require_example(example_input, "compact")
    if channel_multiple is None:
        channel_multiple = 8 if any(t.is_cuda for t in tensors_of(as_inputs(example_input))) else 1
    if isinstance(channel_multiple, bool) or not isinstance(channel_multiple, int) or channel_multiple < 1:
        raise ValueError(f"compact: channel_multiple must be a positive int, got {channel_multiple!r}")
    require_frozen(frozen, "compact")
    return example_input, channel_multiple


def _compact_rest(
    model: nn.Module, frozen: nn.Module, example_input: Any, channel_multiple: int, verify: bool
) -> nn.Module:
    """Any other model: make layers smaller where they are; with more caution where an attempt fails."""
    closed = _closed(model)
    remove_gates(model)
    with keeping_aliases(model):
        _plain_convolutions(model)
    fresh = copied(model)  # the run that is recorded may change the model's state
    flow = Flow(record_example(model, example_input, "compact", unwrap(frozen)))
    for each in (model, fresh):
        filled = _fill_up(each, closed, channel_multiple)
    closed = filled
    masks = _masks(flow, closed)
    if (flow.record.may_skip_layers or flow.record.may_call_again) and not all(bool(m.all()) for *_, m in closed):
        _warn(
            f"the code of {type(unwrap(frozen)).__name__} reads numbers of its tensors, which may decide what runs; "
            f"only what runs on example_input was checked: pass an example that takes the other way, if there is one"
        )
    unsliceable: set[str] = set()
    in_eval: nn.Module | None = None  # the smallest that is right in eval, but does not train
    caution, has_to_train = 0, verify and trains(frozen, example_input)
    while caution <= MOST_CAUTION:
        result = copied(fresh)
        try:
            with keeping_aliases(result):
                shrink(result, Removal(flow, masks, caution, unsliceable))
            if verify:
                require_same(unwrap(frozen), result, example_input, "compact")
        except CannotSlice as failure:
            unsliceable.add(failure.path)
            continue
        except ConversionError:
            caution += 1
            if caution > MOST_CAUTION and in_eval is None:
                raise
            continue
        if not has_to_train or trains(result, example_input):
            return result
        in_eval = result if in_eval is None else in_eval
        caution = max(caution + 1, MOST_CAUTION)  # code that runs in training alone may see any tensor
    assert in_eval is not None
    _warn("the result runs in eval, but not in training, as the model does")
    return in_eval


def _warn(what: str) -> None:
    warnings.warn(f"compact: {what}", stacklevel=5)  # of the caller of compact, past its decorator


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


def _fill_up(
    model: nn.Module, closed: list[tuple[str, type, Tensor]], channel_multiple: int
) -> list[tuple[str, type, Tensor]]:
    """Keep some closed channels, as zeros that their norm or convolution makes, in place; returns the new masks."""
    found = []
    for path, kind, mask in closed:
        module = model.get_submodule(path)
        layer = isinstance(module, _ZEROED) and module.weight is not None
        channels = len(weight_of(module)) if layer else len(mask)
        size = channels // len(mask)  # of a group
        kept = filled_up(mask, channel_multiple // math.gcd(channel_multiple, size))
        if layer and kind not in (GateBranch, GateInput) and not is_computed(module) and not torch.equal(kept, mask):
            zero_channels(module, over_channels(kept & ~mask, channels))
            mask = kept
        found.append((path, kind, mask))
    return found


def _plain_convolutions(model: nn.Module) -> None:
    """Our convolutions become torch.nn's own, with the same parameters."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FrozenConv2d) or (isinstance(module, Conv2d) and isinstance(module.gate, FrozenGate)):
            model.set_submodule(path, plain_conv(module))


def _masks(flow: Flow, closed: list[tuple[str, type, Tensor]]) -> Masks:
    values: dict[Value, Tensor] = {}
    inputs: dict[tuple[Node, Value], Tensor] = {}
    paths: dict[Value, str] = {}
    for path, kind, mask in closed:
        for call in flow.record.calls_of(path):
            value = (call.inputs if kind is GateInput else call.outputs)[0]
            if not flow.has_channels(value) or (kind is GateBranch and bool(mask.all())):
                continue
            wide = over_channels(mask, flow[value].size)
            if kind is GateInput:
                inputs[next(n for n in value.users if n.scope == path), value] = wide
            else:
                values[value] = values[value] & wide if value in values else wide
                paths[value] = path
    return Masks(values, inputs, paths)
