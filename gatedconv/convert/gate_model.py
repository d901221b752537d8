"""``gate_model``: a copy of any convolutional network with gates in its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv._checks import require_choice
from gatedconv._io import first_line
from gatedconv.convert import install
from gatedconv.convert.branches import Branch, find_branches
from gatedconv.convert.channels import Sliceable
from gatedconv.convert.constants import MOST_CAUTION
from gatedconv.convert.conversion import Choice, Conversion, Selection
from gatedconv.convert.example import foreign_hooks, record_example, require_example
from gatedconv.convert.flow import (
    ACTIVATIONS,
    ELEMENTWISE,
    MIXING_NORMS,
    NORMS,
    PASSING,
    REDUCTIONS,
    SPATIAL,
    SPATIAL_OPS,
    Flow,
    op_name,
)
from gatedconv.convert.install import Link, attach, device_of, open_gate, repeated_gates
from gatedconv.convert.mac_trial import estimated_parts
from gatedconv.convert.record import CALL, Node, Record, Value
from gatedconv.convert.record_macs import GatePlaces, merge_terms, node_terms, reachable_share
from gatedconv.convert.sites import Site, SiteFinder
from gatedconv.convert.verify import ConversionError, require_same, require_same_training
from gatedconv.gating import (
    ESTIMATORS,
    ChannelGate,
    Consensus,
    FrozenGate,
    LayerGate,
    MacTerm,
    copied,
    find_gates,
    require_free,
    unwrap,
)
from gatedconv.measure.macs import count_macs
from gatedconv.nn.block import GATES, POSITIONS


@torch.inference_mode(False)  # parameters that are made in inference mode cannot be trained
def gate_model(
    model: nn.Module,
    gate: str = "layer",
    *,
    position: str = "after",
    estimator: str = "ste",
    example_input: Any,
    include: Choice = None,
    exclude: Choice = None,
    verify: bool = True,
) -> nn.Module:
    """A gated copy of any convolutional network: the same class, code, weights and names, and gates in its modules.

    The model runs once on ``example_input``, whatever its code does; what it computes shows where gates can be. A layer
    gate goes on every residual branch (found from the additions; projection shortcuts stay), a channel gate
    on every convolution, behind its norm. A gate is a submodule of the module that it gates, whose output a forward
    hook multiplies by the gate's decision; nothing is rewritten. The gate of a module that is called several times
    decides in each call. Gates start open: in eval the result computes what ``model`` does. Layers whose output reaches
    an output of the network with no layer in between that mixes channels (scores, boxes, heat maps) are never gated,
    unless ``include`` names the layer exactly.

    Args:
        model: any network that takes images (N, C, H, W), clips (N, T, C, H, W) or vectors (N, K); left as it is.
        gate: "layer", "channel" or "both".
        position: of the channel gates. "after": behind the norm that follows a convolution, also where an activation,
            a pool or dropout is between them, or behind the convolution where there is none; one gate for each group
            of a ``GroupNorm``, whose channels depend on each other. "middle": behind the
            activation after that, so the output of a residual branch is not gated. "before": on the input of each
            residual branch, the shortcut ungated, and of each convolution outside of them.
        estimator: "ste", "gumbel", "bernoulli" or "batch_mean".
        example_input: images, clips or vectors that the model accepts, or a tuple of positional or a dict of keyword
            arguments; MACs are counted at its size.
        include: gate only these layers and blocks: a name (a block's includes all inside it), a pattern
            as of ``fnmatch``, a list of them, or a function (name, module) -> bool.
        exclude: leave these alone.
        verify: compare copies of the result and the model: on the example, a larger batch, larger images and other
            numbers among the inputs, and one training step with the gates forced open. Costs three forwards (more for
            numbers) and one training step of each.

    Returns:
        the gated network, with ``mac_terms`` and with ``conversion``, which lists every gate and, with its reason,
        every layer that has none.

    Raises:
        TypeError, ValueError: arguments out of range, a model that cannot be copied or does not run on the example, a
            pattern that matches nothing, or no place for a gate at all.
        ConversionError: the result does not compute what the model does.
    """
    example_input = _check(model, gate, position, estimator, example_input)
    selection = Selection(include, exclude)
    model = unwrap(model)
    result, probe = _copied(model), _copied(model)
    record = record_example(probe, example_input, "gate_model", model)
    if made := sorted(dict(probe.named_modules()).keys() - dict(result.named_modules()).keys()):
        raise ValueError(
            f"gate_model: {type(model).__name__} makes modules in its forward ({', '.join(made[:3])}); run it on "
            f"example_input once, so that they are there"
        )
    flow = Flow(record)
    branches, rejected = find_branches(flow)
    conversion = Conversion()
    installer = _Installer(result, flow, conversion, estimator)
    sites: list[Site] = []
    if gate in ("channel", "both"):
        finder = SiteFinder(flow, branches, selection)
        sites = finder.find(position)
        conversion.skipped.update(finder.skipped)
    if gate in ("layer", "both"):
        conversion.skipped.update(rejected)
        for calls in installer.by_place(branches):
            if reason := installer.why_not(calls, selection):
                conversion.skipped.setdefault(calls[0].name or f"add_{calls[0].addition.order}", reason)
            else:
                installer.layer(calls)
    for site in sites:
        installer.channel(site)
    selection.require_used()
    if not conversion.gated:
        nothing = "it has no residual branches" if gate == "layer" else "it has no convolutions"
        reasons = "; ".join(sorted(set(conversion.skipped.values()))[:5]) or nothing
        raise ValueError(f"gate_model: no place for a {gate!r} gate in {type(model).__name__}: {reasons}")
    installer.finish()
    total, conversion.note = total_macs(probe, example_input)
    by_node = node_terms(flow, installer.gated)
    terms = merge_terms((term for of_node in by_node.values() for term in of_node), total)
    conversion.estimated = estimated_parts(flow, installer.gated, by_node)
    conversion.reachable_macs = reachable_share(terms)
    conversion.gated = {name: conversion.gated[name] for name in find_gates(result)}
    size = tuple(example_input.shape) if isinstance(example_input, Tensor) else None
    vars(result).update(mac_terms=terms, conversion=conversion, gatedconv_size=size)
    if verify:
        try:
            trained = _verify(model, result, example_input, conversion)
        except ConversionError as error:
            raise ConversionError(f"{error}{foreign_hooks(result, model)}") from error
        if _runs_in_training_alone(trained, record):  # what it reads may have to keep its channels
            conversion.estimated |= estimated_parts(flow, installer.gated, by_node, MOST_CAUTION)
    return result


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:  # whatever the attributes' own code raises
        raise ValueError(f"gate_model: {type(model).__name__} cannot be copied (copy.deepcopy): {error}") from error


def total_macs(model: nn.Module, example_input: Any) -> tuple[float | None, str]:
    """MACs of one image by ``count_macs``, or why they are unknown."""
    if not isinstance(example_input, Tensor) or not len(example_input):
        return None, "MACs are those of the recorded layers: count_macs takes a single tensor"
    why = ""
    for images in (example_input[:1], example_input):  # some code needs a multiple of several images
        try:
            return count_macs(model, images) / len(images), ""
        except Exception as error:  # fvcore traces the model's code, which may raise anything
            why = why or f"{type(error).__name__}: {first_line(error)}"
    return None, f"MACs are those of the recorded layers, count_macs fails: {why}"[:200]


@dataclass
class _Installer:
    """Puts gates into ``result``; ``gated`` has the places in the record of the source where they multiply."""

    result: nn.Module
    flow: Flow
    conversion: Conversion
    estimator: str

    def __post_init__(self) -> None:
        self.gated = GatePlaces({}, {}, {})
        self.values: dict[Value, tuple[str, int]] = {}
        self.inputs: dict[tuple[Node, Value], tuple[str, int]] = {}
        self.layers: dict[Node, tuple[str, ...]] = {}
        self.ends: dict[Value, str] = {}
        self.links: list[Link] = []
        self.link_of: dict[Site, Link] = {}
        self.path_of: dict[Site, str] = {}
        self.read_by_code = Sliceable(self.flow).read_by_code

    def by_place(self, branches: list[Branch]) -> list[list[Branch]]:
        """Branches with the same modules at their ends together: those of the calls of one block, in order."""
        places: dict[Any, list[Branch]] = {}
        for branch in branches:
            start, end = branch.start(self.flow.record), branch.end(self.flow.record)
            place = branch if start is None or end is None else (start.path, end.path)
            places.setdefault(place, []).append(branch)
        return [sorted(calls, key=lambda b: b.addition.order) for calls in places.values()]

    def why_not(self, calls: list[Branch], selection: Selection) -> str:
        """Why a residual branch gets no gate; empty if it does."""
        branch, record = calls[0], self.flow.record
        if reason := selection.reason(branch.name, self.result.get_submodule(branch.name)):
            return reason
        modules = [n.module for n in branch.nodes if n.module is not None]
        parameters = [p for module in modules for p in module.parameters()]
        if parameters and not any(p.requires_grad for p in parameters):
            return "its weights are frozen (requires_grad=False)"
        start, end = branch.start(record), branch.end(record)
        if start is None:
            return "no module of its own reads its input"
        if end is None:
            return "no module of its own ends it"
        order = [c.first for b in calls for c in (b.start(record), b.end(record)) if c is not None]
        times, sizes = len(record.calls_of(start.path)), {self.flow[b.entry].size for b in calls}
        alike = len(calls) == times and len(sizes) == 1 and order == sorted(order)
        return "" if alike else f"called {times} times, of which {len(calls)} are such a branch"

    def layer(self, calls: list[Branch]) -> None:
        """Gate a residual branch."""
        record, branch = self.flow.record, calls[0]
        start, end = branch.start(record), branch.end(record)
        assert start is not None and end is not None
        channels, axis = self.flow[branch.entry].size, self.flow[branch.entry].axis
        first, last = self.result.get_submodule(start.path), self.result.get_submodule(end.path)
        gate = LayerGate(channels, estimator=self.estimator, device=device_of(first, self.result))
        gate.calls = len(calls)
        name = attach(first, open_gate(gate), "layer_gate")
        link, inside = Link(), {node for each in calls for node in each.nodes}
        self.links.append(link)
        convs = tuple(
            self.result.get_submodule(n.scope)
            for n in branch.nodes
            if type(n.module) is nn.Conv2d and inside.issuperset(record.same_layer(n))
        )
        first.register_forward_pre_hook(install.DecideBranch(name, axis, link))
        for reader in _sample_wise(branch, record):
            self.result.get_submodule(reader).register_forward_pre_hook(install.SelectSamples("", axis, link))
        last.register_forward_hook(install.GateBranch("", axis, link, convs))
        path = f"{start.path}.{name}"
        self.conversion.gated[path] = f"the residual branch of {branch.name or 'the model'}"
        for each in calls:
            last_call = each.end(record)
            assert last_call is not None
            self.ends[last_call.outputs[0]] = path
            for node in each.nodes:
                self.layers[node] = (*self.layers.get(node, ()), path)

    def channel(self, site: Site) -> None:
        """Gate the channels of a layer."""
        channels = self.flow[site.values[0]]
        module = self.result.get_submodule(site.path)
        convs = tuple(self.result.get_submodule(self._path(conv)) for conv in site.convs)
        alone = site.path not in self.read_by_code
        if site.follows is not None:
            leader = site.follows
            link = self.link_of.setdefault(leader, Link())
            self._link_leader(leader, link)
            module.register_forward_hook(install.FollowGate("", channels.axis, link, convs, alone))
            self.values.update(dict.fromkeys(site.values, (self.path_of[leader], leader.num_gates)))
            return
        gate = ChannelGate(
            channels.size, site.num_gates, estimator=self.estimator, device=device_of(module, self.result)
        )
        gate.calls = len(site.values)
        name = attach(module, open_gate(gate), "channel_gate")
        path = f"{site.path}.{name}"
        self.path_of[site] = path
        kind = "input" if site.is_input and site.layer == site.path else "output"
        groups = f", in {site.num_gates} groups" if site.num_gates < channels.size else ""
        self.conversion.gated[path] = f"the {kind} channels of {site.layer}{groups}"
        if site.is_input:
            module.register_forward_pre_hook(install.GateInput(name, channels.axis, None, convs))
            (value,) = site.values
            reader = next(u for u in value.users if u.scope == site.path)
            self.inputs[reader, value] = (path, site.num_gates)
        else:
            module.register_forward_hook(install.GateOutputHook(name, channels.axis, None, convs, alone))
            self.values.update(dict.fromkeys(site.values, (path, site.num_gates)))

    def _link_leader(self, leader: Site, link: Link) -> None:
        for hook in install.hooks_of(self.result.get_submodule(leader.path)):
            if isinstance(hook, install.GateOutputHook) and hook.name and hook.link is None:
                hook.link = link
                self.links.append(link)

    def _path(self, module: nn.Module) -> str:
        return next(n.scope for n in self.flow.record.nodes if n.module is module)

    def finish(self) -> None:
        """Hooks of the whole model."""
        self.gated = GatePlaces(self.values, self.inputs, self.layers, self.ends)
        self.result.register_forward_pre_hook(install.BeforeForward(self.links, repeated_gates(self.result)))


def _sample_wise(branch: Branch, record: Record) -> list[str]:
    """Paths of the layers that read the branch's input, where every sample can be computed by itself; else none.

    Code that could see the batch's size, such as ``view``, and reads that are no layer's keep the whole batch.
    """
    readers = [node for node in branch.entry.users if node in branch.nodes]
    layers = (*NORMS, *MIXING_NORMS, *ACTIVATIONS, *PASSING, *SPATIAL, nn.Conv2d, nn.Linear)
    if any(isinstance(n.module, NORMS) and getattr(n.module, "running_mean", n) is None for n in branch.nodes):
        return []  # statistics of the batch
    simple = ELEMENTWISE | SPATIAL_OPS | set(REDUCTIONS) | {"cat", "same", "permute", "transpose"}
    plain = all(isinstance(n.module, layers) if n.op == CALL else op_name(n) in simple for n in branch.nodes)
    times = len(record.calls_of(branch.name))
    once = all(r.op == CALL and r.args and len(record.calls_of(r.scope)) == times for r in readers)
    return [r.scope for r in readers] if plain and once else []


def _verify(model: nn.Module, result: nn.Module, example_input: Any, conversion: Conversion) -> nn.Module:
    """Compare the two; returns a copy of the model with the gradients of one training step."""
    require_same(model, result, example_input, "gate_model")
    inputs = [example_input]
    if isinstance(example_input, Tensor):
        few = example_input[:4] if len(example_input) > 1 else torch.cat([example_input, example_input.flip(-1)])
        inputs = [few, example_input]  # some code takes a multiple of so many images, or one alone
    for images in inputs:
        opened, ran, ends, again = _opened(result)
        trained = copied(model)
        note = require_same_training(trained, opened, images, "gate_model")
        if not note:
            _require_gradients(ran, ends)
            _require_starts(opened, again)
            note = _without_gradients(trained, ran)
            break
    conversion.note = "; ".join(filter(None, (conversion.note, note)))
    return trained


def _opened(result: nn.Module) -> tuple[nn.Module, dict[str, bool], dict[str, bool], Counter[str]]:
    """A copy with its gates forced open, and whether gradients were enabled, by the gates' paths.

    In the first dict where the gate runs, in the second where another module uses its decision; and how much more often
    than the gate those modules ran inside of a backward pass.
    """
    opened = copied(result)
    ran: dict[str, bool] = {}
    ends: dict[str, bool] = {}
    again = Counter[str]()

    def note(where: dict[str, bool], path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            where[path] = torch.is_grad_enabled() and where.get(path, True)
            if torch._C._current_graph_task_id() >= 0:
                again[path] += 1 if where is ends else -1

        return hook

    for path, end in install.link_ends(opened):
        end.register_forward_pre_hook(note(ends, path))
    for path, gate in find_gates(opened).items():
        constant = FrozenGate(torch.ones_like(gate.running_open_rate, dtype=torch.bool))
        constant.register_forward_pre_hook(note(ran, path))
        constant.calls = gate.calls
        opened.set_submodule(path, constant)
    return opened, ran, ends, again


def _require_starts(opened: nn.Module, again: Mapping[str, int]) -> None:
    cut = [path for path, gate in find_gates(opened).items() if gate.calls > 1 and again[path] > 0]
    if cut:
        raise ConversionError(
            f"gate_model: a checkpoint holds the end of what {cut[0]} gates, but not its start, and runs several times "
            f"in one forward: it cannot know which decision to repeat; let it hold the whole block, or exclude that"
        )


def _require_gradients(ran: dict[str, bool], ends: dict[str, bool]) -> None:
    cut = [path for path, enabled in ends.items() if not enabled and ran.get(path)]
    if cut:
        raise ConversionError(
            f"gate_model: a checkpoint with use_reentrant=True holds the end of what {cut[0]} gates, which then gets "
            f"no gradient; use_reentrant=False gives it one"
        )


def _runs_in_training_alone(trained: nn.Module, record: Record) -> bool:
    """Whether something learned that no operation of the eval-mode record reads, such as an auxiliary head."""
    read = {value.name for node in record.nodes for value in node.inputs}
    layers = tuple(f"{node.scope}." for node in record.nodes if node.op == CALL)
    learned = [name for name, p in trained.named_parameters() if p.grad is not None]
    return any(name not in read and not name.startswith(layers) for name in learned)


def _without_gradients(trained: nn.Module, ran: dict[str, bool]) -> str:
    """A note about gated layers that require gradients and get none, or whose gates' losses are cut off; else ""."""
    unreached = []
    for path in ran:
        learning = [p for p in trained.get_submodule(path.rpartition(".")[0]).parameters() if p.requires_grad]
        if learning and all(p.grad is None for p in learning):
            unreached.append(path)
    notes = [f"no gradient reaches {', '.join(unreached)}: they stay as they are"] if unreached else []
    # Backward computes these a second time, with gradients.
    again = [path for path in ran if not ran[path] and path not in unreached]
    if again:
        notes.append(
            f"the losses on the gates do not reach {', '.join(again)}, which a checkpoint with use_reentrant=True runs "
            f"without gradients; use_reentrant=False lets them"
        )
    return "; ".join(notes)


def _check(model: Any, gate: str, position: str, estimator: str, example_input: Any) -> Any:
    """The example; raises for arguments out of range."""
    if not isinstance(model, nn.Module):
        hint = ": pass its .module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise TypeError(f"gate_model: model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    for name, kind in (("mac_terms", MacTerm), ("conversion", Conversion), ("consensus", Consensus)):
        require_free(model, name, kind, "gate_model")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("gate_model: a TorchScript module cannot be hooked or recorded; pass the nn.Module itself")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("gate_model: the model has lazy layers without weights; run it on an image once")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError("gate_model: the model is on the meta device, without weights; load them first")
    if gates := find_gates(unwrap(model)):
        raise ValueError(
            f"gate_model: the model has gates already (as {next(iter(gates))!r}); pass the network without gates, "
            f"gate='both' puts in both kinds; what is frozen can be compacted first, by gatedconv.compact"
        )
    example_input = require_example(example_input, "gate_model")
    require_choice("gate_model", "gate", gate, GATES)
    require_choice("gate_model", "position", position, POSITIONS)
    require_choice("gate_model", "estimator", estimator, ESTIMATORS)
    return example_input
