"""Changes in a user's modules as JSON, and their repetition on another copy of the dense network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.convert.install import BeforeForward, GateHook, Link, hooks_of, keeping_aliases, repeated_gates
from gatedconv.deploy.graph_format import build_module, describe_module
from gatedconv.deploy.slicing import COUNTS
from gatedconv.gating import Consensus, Gate, attribute_of, copied
from gatedconv.nn import EmptyMap, Framed, FrozenConv2d, GatherChannels
from gatedconv.nn.modules import take_place

_HOOKS = {cls.__name__: cls for cls in GateHook.__subclasses__()}
_BEFORE = ("GateInput", "DecideBranch", "SelectSamples")


def describe_changes(model: nn.Module) -> dict[str, Any]:
    """The changes that ``gate_model``, ``freeze`` and ``compact`` made; empty for a model that they did not make.

    Raises:
        TypeError: a change that a file cannot describe.
    """
    links: dict[int, int] = {}
    paths = {id(module): name for name, module in model.named_modules()}
    frames, removed, counts, hooks, gates, frozen, before = {}, {}, {}, {}, {}, [], {}
    for path, module in model.named_modules():
        if isinstance(module, Framed):
            frames[path] = [
                [
                    name,
                    None
                    if name == "layer" and not isinstance(part, (EmptyMap, GatherChannels))
                    else describe_module(f"{path}.{name}", part),
                ]
                for name, part in module.named_children()
            ]
        elif type(module) in (EmptyMap, GatherChannels, nn.Identity) and path:
            removed[path] = describe_module(path, module)
        if isinstance(module, Gate):
            gates[path] = describe_module(path, module)
        if isinstance(module, FrozenConv2d):
            frozen.append(path)
        found = {name: value for name in COUNTS if isinstance(value := vars(module).get(name), int)}
        if found and not isinstance(module, (Gate, Framed)):
            counts[path] = found
        if mine := hooks_of(module):
            hooks[path] = [_describe_hook(hook, links, paths) for hook in mine]
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BeforeForward):
                before[path] = [links.setdefault(id(link), len(links)) for link in hook.links]
    made = frames or gates or frozen or hooks or attribute_of(model, "consensus", Consensus) is not None
    kinds: dict[str, Any] = {"frames": frames, "removed": removed, "counts": counts, "hooks": hooks}
    kinds |= {"gates": gates, "frozen": frozen, "before": before}
    return kinds if made else {}


def _describe_hook(hook: GateHook, links: dict[int, int], paths: dict[int, str]) -> list[Any]:
    link = None if hook.link is None else links.setdefault(id(hook.link), len(links))
    convs = [paths[id(c)] for c in hook.convs if id(c) in paths]
    return [type(hook).__name__, hook.name, hook.axis, link, convs, hook.alone]


def apply_changes(dense: nn.Module, changes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the dense network with the changes that were described, its tensors as large as those of the file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: they do not fit the network.
    """
    model = copied(dense)
    model.eval()  # the file's tensors are those of eval: some classes merge weights there
    with keeping_aliases(model):
        _replace(model, changes, tensors)
    for path, numbers in changes["counts"].items():
        module = model.get_submodule(path)
        for name in COUNTS:
            if name in numbers and isinstance(vars(module).get(name), int):
                setattr(module, name, int(numbers[name]))
    links: dict[int, Link] = {}
    for path, found in changes["hooks"].items():
        for kind, name, axis, link, convs, alone in found:
            module = model.get_submodule(path)
            shared = None if link is None else links.setdefault(link, Link())
            skips = tuple(model.get_submodule(c) for c in convs)
            hook: Any = _HOOKS[kind](name, int(axis), shared, skips, bool(alone))
            if kind in _BEFORE:
                module.register_forward_pre_hook(hook)
            else:
                module.register_forward_hook(hook)
    for path, numbers in changes["before"].items():
        module = model.get_submodule(path)
        before = BeforeForward([links.setdefault(n, Link()) for n in numbers], repeated_gates(module))
        module.register_forward_pre_hook(before)
    _resize(model, tensors)
    return model


def _replace(model: nn.Module, changes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Frames, constants, gates and frozen convolutions, in place."""
    for path, parts in changes["frames"].items():
        layer = model.get_submodule(path)
        built = [(n, layer if spec is None else build_module(f"{path}.{n}", spec, tensors)) for n, spec in parts]
        framed = Framed(OrderedDict(built))
        if framed.layer is not layer:
            take_place(framed.layer, layer, hooks=False)
        model.set_submodule(path, framed)
    for path, spec in changes["removed"].items():
        removed = build_module(path, spec, tensors)
        take_place(removed, model.get_submodule(path), hooks=False)
        model.set_submodule(path, removed)
    for path, spec in changes["gates"].items():
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner).add_module(name, build_module(path, spec, tensors))
    for path in changes["frozen"]:
        conv = model.get_submodule(path)
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"{path} is a {type(conv).__name__}, and the file has a convolution there")
        frozen = FrozenConv2d(conv, torch.ones_like(tensors[f"{path}.out_open"]))
        take_place(frozen, conv, hooks=False)
        frozen._modules.update(conv._modules)
        model.set_submodule(path, frozen)


def _resize(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Parameters and buffers of other sizes than the file's get those, and a layer its bias."""
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        current = getattr(module, attribute, None)
        if current is None and attribute in module._parameters:
            module.register_parameter(attribute, nn.Parameter(torch.empty_like(tensor)))
        elif isinstance(current, Tensor) and current.shape != tensor.shape:
            if attribute in module._parameters:
                module._parameters[attribute] = nn.Parameter(torch.empty_like(tensor), current.requires_grad)
            elif attribute in module._buffers:
                module._buffers[attribute] = torch.empty_like(tensor)


def ties_of(model: nn.Module) -> dict[str, str]:
    """Names of parameters and buffers that are another name's tensor: name -> that name."""
    first: dict[int, str] = {}
    ties = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return ties
