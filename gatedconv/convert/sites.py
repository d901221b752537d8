"""Sites of channel gates: behind the norm of each convolution, in front of an activation's reader, or of a block."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from math import inf

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from gatedconv.convert.branches import Branch
from gatedconv.convert.conversion import Selection
from gatedconv.convert.flow import ACTIVATION_OPS, ACTIVATIONS, MIXING_NORMS, NORMS, PASSING, Flow, is_mixing, op_name
from gatedconv.convert.module_kinds import CONVS, groups_of, has_own_hooks, is_depthwise, is_exact, is_known_transposed
from gatedconv.convert.record import CALL, ModuleCall, Node, Value

GATED_ALREADY = "another layer's gate is in the same place"


@dataclass(eq=False)
class Site:
    """A channel gate to be.

    Attributes:
        layer: path of the layer, or block, whose channels are gated.
        path: of the module that gets the gate.
        values: what is gated, in each call of the layer.
        is_input: whether the module's input is gated, rather than its output.
        num_gates: one for each channel, or for each group of a group norm.
        follows: the site whose gate is used again, behind a depthwise convolution of what that one gates.
        convs: convolutions that compute the gated channels and nothing else.
    """

    layer: str
    path: str
    values: tuple[Value, ...]
    num_gates: int
    is_input: bool = False
    follows: Site | None = None
    convs: tuple[nn.Module, ...] = ()


@dataclass
class SiteFinder:
    """Walks the layers of a record; ``skipped`` collects the reasons."""

    flow: Flow
    branches: list[Branch]
    selection: Selection
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.record = self.flow.record
        self.model = self.record.model
        self.owners = Counter(
            id(p) for path in self.record.calls for p in self.model.get_submodule(path).parameters(recurse=False)
        )
        self.shortcut_nodes = {n for branch in self.branches for n in branch.shortcut_nodes}
        # An identity shortcut carries these on to every later block: a channel closed here alone saves nothing.
        self.stream = {v for b in self.branches if not b.shortcut_nodes for v in self._origin(b.entry)}
        self.pooled = self._pooled()
        self.final = self._final()

    def find(self, position: str) -> list[Site]:
        """The sites for one of the positions "after", "middle", "before"."""
        sites = self._before() if position == "before" else self._behind(position)
        self._explain_the_rest()
        return sites

    # -- positions -------------------------------------------------------------------------------------

    def _behind(self, position: str) -> list[Site]:
        sites: list[Site] = []
        gated: dict[Value, Site] = {}
        for calls in self._layers():
            name = calls[0].scope
            reason = self._reason(calls)
            found = self._targets(calls, position) if not reason else reason
            if isinstance(found, str):
                self.skipped[name] = found
                continue
            path, targets, is_input = found
            leader = self._leader(calls, gated)
            reason = self._target_reason(name, targets, path)
            if reason:
                self.skipped[name] = reason
            elif any(target in gated for target in targets):
                self.skipped[name] = GATED_ALREADY
            elif leader is not None and not is_input and not leader.is_input:
                self.skipped[name] = f"depthwise: the gate of {leader.layer} closes its channels too"
                gated.update(dict.fromkeys(targets, leader))
                convs = self._convs(calls, targets, leader.num_gates)
                sites.append(Site(name, path, targets, leader.num_gates, follows=leader, convs=convs))
            else:
                num_gates = self._num_gates(calls[0].outputs[0], targets[0])
                convs = self._convs(calls, targets, num_gates)
                sites.append(Site(name, path, targets, num_gates, is_input, convs=convs))
                gated.update(dict.fromkeys(targets, sites[-1]))
        return sites

    def _before(self) -> list[Site]:
        sites: list[Site] = []
        inside = {n for branch in self.branches for n in branch.nodes}
        for branch in self.branches:
            reason = self.selection.reason(branch.name, self.model.get_submodule(branch.name))
            readers = [u for u in branch.entry.users if u in branch.nodes]
            if branch.entry.node is not None and branch.entry.node.op == "input":
                reason = reason or "it reads the model's input"
            self._read_by(sites, branch.name or "the model", branch.entry, readers, reason)
        for calls in self._layers():
            node = calls[0]
            if any(call in inside for call in calls):
                continue
            reason = self._reason(calls, output=False)
            source = node.inputs[0]
            if source.node is not None and source.node.op == "input":
                reason = reason or "it reads the model's input"
            self._read_by(sites, node.scope, source, [node], reason)
        return sites

    def _read_by(self, sites: list[Site], name: str, value: Value, readers: list[Node], reason: str) -> None:
        if not reason and (len(readers) != 1 or readers[0].op != CALL):
            reason = "its input is read by several layers, or by code that is no module"
        if not reason and len(self.record.calls_of(readers[0].scope)) > 1:
            reason = "the layer that reads it is called several times"
        if not reason and not readers[0].args:
            reason = "the layer that reads it takes it by keyword"
        if not reason and any(site.path == readers[0].scope for site in sites):
            reason = GATED_ALREADY
        if reason:
            self.skipped[name] = reason
        else:
            sites.append(Site(name, readers[0].scope, (value,), self.flow[value].size, is_input=True))

    def _targets(self, calls: list[Node], position: str) -> tuple[str, tuple[Value, ...], bool] | str:
        """The module to gate, what is gated in each call, and whether that is the module's input; or why none is."""
        path, targets, is_input = "", list[Value](), False
        for call in calls:
            found = self._target(call.outputs[0], position, len(calls))
            if isinstance(found, str):
                return found
            if path not in ("", found[0]):
                return f"its {len(calls)} calls end in different modules, {path} and {found[0]}"
            path, target, is_input = found
            targets.append(target)
        if len(calls) > 1 and any(target.node not in self.record.layers.get(path, ()) for target in targets):
            return f"its {len(calls)} calls end in {path}, which has code of its own"
        return path, tuple(targets), is_input

    def _target(self, value: Value, position: str, calls: int) -> tuple[str, Value, bool] | str:
        """The same of one of the calls of a layer."""
        norm, activated = self._norm_behind(value)
        if norm is not None and len(self.record.calls_of(norm.path)) > calls:
            return f"its norm {norm.path} is called {len(self.record.calls_of(norm.path))} times"
        path = norm.path if norm is not None else value.node.scope  # type: ignore[union-attr]
        current = norm.outputs[0] if norm is not None else value
        if position == "after" or (activated and all(current is not branch.part for branch in self.branches)):
            return path, current, False
        user = current.users[0] if len(current.users) == 1 else None
        if user is None or not is_activation(user):
            return "no activation follows inside its branch"
        result = user.outputs[0]
        readers = result.users
        alone = len(readers) == 1 and readers[0].op == CALL and len(self.record.calls_of(readers[0].scope)) == 1
        if alone and calls == 1 and readers[0].args:
            return readers[0].scope, result, True
        if user.op == CALL and len(self.record.calls_of(user.scope)) == calls:
            return user.scope, result, False
        return "its activation is no module of its own, and several layers read it"

    def _norm_behind(self, value: Value) -> tuple[ModuleCall | None, bool]:
        """The norm, of any class, that alone reads a value, and whether an activation is in front of it.

        There may be activations, pools and dropout between the two, if the norm keeps channels apart as they do.
        """
        first, activated = value, False
        while True:
            for call in self.record.readers(value):
                by_group = any(self.flow.kind(out) == "group_norm" for out in call.outputs)
                if value is not first and not (by_group or isinstance(call.module, NORMS)):
                    continue
                if not is_norm(call.module) or len(call.inputs) != 1 or len(call.outputs) != 1:
                    continue
                same = call.outputs[0].tensor.shape == value.tensor.shape
                if same and value.users and all(call.first <= user.order < call.last for user in value.users):
                    return call, activated
            user = value.users[0] if len(value.users) == 1 else None
            passes = user is not None and isinstance(user.module, (*PASSING, nn.MaxPool2d, nn.AvgPool2d))
            if user is None or not (passes or is_activation(user)) or len(user.outputs) != 1:
                return None, False
            activated |= is_activation(user)
            value = user.outputs[0]

    # -- reasons ---------------------------------------------------------------------------------------

    def _layers(self) -> list[list[Node]]:
        """The calls of each convolution and linear layer."""
        known = ("conv", "linear")
        layers = self.record.layers.values()
        return [calls for calls in layers if any(self.flow.kind(v) in known for call in calls for v in call.outputs)]

    def _reason(self, calls: list[Node], *, output: bool = True) -> str:
        """Why this layer is left alone; empty if it is not."""
        node = calls[0]
        module, name, value = node.module, node.scope, node.outputs[0]
        assert module is not None
        parameters = list(module.parameters(recurse=False))
        if chosen := self.selection.reason(name, module):
            return chosen
        if self.flow.kind(value) == "linear" and value.tensor.dim() != 4:
            return "a dense layer"
        if not self.flow.is_uniform(node):
            return f"called {len(calls)} times, not on an image each time"
        if any(self.owners[id(p)] > 1 for p in parameters):
            return "its weights are shared with another layer"
        if parameters and not any(p.requires_grad for p in module.parameters()):
            return "its weights are frozen (requires_grad=False)"
        if all(call.outputs[0] in self.pooled for call in calls):
            return "it works on pooled 1x1 maps"
        if self.shortcut_nodes.issuperset(calls):
            return "the shortcut of a residual block"
        return "a single output channel" if output and self.flow[value].size < 2 else ""

    def _target_reason(self, name: str, targets: tuple[Value, ...], path: str) -> str:
        if self.stream.intersection(targets):
            return "identity shortcuts carry its output on"
        if has_own_hooks(self.model.get_submodule(path)):
            return f"{path} has hooks, which may change what it returns"
        if self.final.intersection(targets):
            if not self.selection.names_exactly(name):
                return "its channels are the model's outputs"
            warnings.warn(
                f"gate_model: {name} is gated because include names it, though its channels are the model's outputs: "
                f"a closed one is constant for every image",
                stacklevel=6,  # of the caller of gate_model, past its decorator
            )
        return ""

    def _explain_the_rest(self) -> None:
        """A reason for every other convolution of the model."""
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.modules.conv._ConvNd) or name in self.skipped:
                continue
            calls = self.record.calls_of(name)
            known = calls and self.flow.kind(calls[0].outputs[0]) == "conv"
            if not known:
                self.skipped[name] = _why_no_conv(module, bool(calls))

    # -- sets of values --------------------------------------------------------------------------------

    def _leader(self, calls: list[Node], gated: dict[Value, Site]) -> Site | None:
        """The site that gates the input of a depthwise convolution in all of its calls; None for other layers."""
        module = calls[0].module
        if not is_depthwise(module) or module.in_channels != module.out_channels:  # type: ignore[union-attr]
            return None
        origins = [next((v for v in self._origin(call.inputs[0]) if v in gated), None) for call in calls]
        found = {gated[v].follows or gated[v] for v in origins if v is not None}
        if len(found) != 1 or None in origins:
            return None
        (leader,) = found
        # Each call of the follower takes the leader's last decision.
        order = [value.node.order for value in leader.values if value.node is not None]
        paired = len(order) == len(calls) and all(
            first < call.order < later for first, call, later in zip(order, calls, [*order[1:], inf], strict=True)
        )
        return leader if paired else None

    def _origin(self, value: Value, num_gates: int = 0) -> list[Value]:
        """The values from which one comes channel by channel.

        Args:
            value: where to begin.
            num_gates: follow it through group norms, too, whose groups each have one of so many gates; 0 does not.
        """
        chain = [value]
        while True:
            node, kind = value.node, self.flow.kind(value)
            assert node is not None
            by_group = num_gates and kind == "group_norm" and groups_of(node.module) % num_gates == 0
            if not (by_group or kind == "elementwise") or len(self.flow.operands(node)) != 1:
                return chain
            value = self.flow.source(node)
            chain.append(value)

    def _num_gates(self, value: Value, target: Value) -> int:
        """Of the channels of ``target``, which follow those of a layer's output ``value``.

        Behind a group norm a channel alone cannot be removed: the others of its group depend on it.
        """
        size, found = self.flow[value].size, target
        while found is not value and (node := found.node) is not None and len(node.inputs) == 1:
            if self.flow.kind(found) == "group_norm":
                return groups_of(node.module)
            found = node.inputs[0]
        return size

    def _convs(self, calls: list[Node], targets: tuple[Value, ...], num_gates: int) -> tuple[nn.Module, ...]:
        """The convolution, where between it and the gate every channel is by itself and nothing else reads it."""
        found = [self._conv(call, target, num_gates) for call, target in zip(calls, targets, strict=True)]
        return found[0] if all(found) else ()

    def _conv(self, node: Node, target: Value, num_gates: int) -> tuple[nn.Module, ...]:
        for value in self._origin(target, num_gates):
            if value is not target and len({u.order for u in value.users}) > 1:
                return ()
            if value is node.outputs[0]:
                return (node.module,) if type(node.module) is nn.Conv2d and not has_own_hooks(node.module) else ()
        return ()

    def _pooled(self) -> set[Value]:
        """Values that are made of global averages alone, as inside squeeze-excite."""
        pooled: set[Value] = set()
        for node in self.record.nodes:
            sources = self.flow.operands(node)
            reduces = sources and sources[0].tensor.dim() == 4 and node.outputs and _is_global_pool(node)
            if reduces or (sources and all(v in pooled for v in sources)):
                pooled.update(node.outputs)
        return pooled

    def _final(self) -> set[Value]:
        """Values whose channels reach the model's output with no layer in between that mixes channels."""
        final: set[Value] = set()
        for node in reversed(self.record.nodes):
            if node.op == "output" or (any(v in final for v in node.outputs) and not is_mixing(node)):
                final.update(node.inputs)
        return final


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm: torch.nn's, or of a class that is called one and holds no other layers."""
    if isinstance(module, NORMS + MIXING_NORMS):
        return True
    if "norm" not in type(module).__name__.lower() or type(module).__name__.startswith("Gated"):
        return False
    return not any(isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in module.modules())


def is_activation(node: Node) -> bool:
    """Whether the node is an activation function, as a module or a call."""
    if node.op == CALL:
        return isinstance(node.module, (*ACTIVATIONS, nn.PReLU))
    return op_name(node) in ACTIVATION_OPS


def _why_no_conv(module: nn.Module, called: bool) -> str:
    if not called:
        return "it does not run on example_input, or its forward is not called through the module"
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return "torch.nn.utils.prune masks its weights in every forward; prune.remove makes the masks permanent"
    if has_own_hooks(module):
        return "it has hooks, which may change what it returns"
    if not isinstance(module, CONVS):
        return f"a {type(module).__name__}: only two-dimensional convolutions are gated"
    if isinstance(module, nn.ConvTranspose2d) and not is_known_transposed(module):
        own = not is_exact(module, nn.ConvTranspose2d)
        return "a transposed convolution " + ("with code of its own" if own else "in groups of several channels")
    return "its input is no image with channels in dimension 1"


def _is_global_pool(node: Node) -> bool:
    module = node.module
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        return module.output_size in (1, (1, 1))
    if module is None and op_name(node) in ("mean", "amax", "_adaptive_avg_pool2d"):
        shape = node.outputs[0].tensor.shape
        return len(shape) == 4 and (shape[2:] == torch.Size((1, 1)) or shape[1:3] == torch.Size((1, 1)))
    return False
