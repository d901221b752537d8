"""Where channel gates go: behind the norm of each convolution, its activation, or before a block."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from gatedconv.convert.branches import Branch
from gatedconv.convert.canonical import op_name, scope_of, submodule
from gatedconv.convert.computed import has_own_hooks, is_conv
from gatedconv.convert.conversion import Selection
from gatedconv.convert.flow import ACTIVATIONS, MIXING_NORMS, NORMS, Flow
from gatedconv.convert.trace import attribute
from gatedconv.gating import Gate
from gatedconv.gating.gate import LearnedGate


@dataclass(eq=False)
class Site:
    """A channel gate to be.

    Attributes:
        name: path of the layer whose output is gated.
        node: the gate reads and multiplies this node's value.
        readers: the nodes that get the product; None for all.
        is_block: the name is that of a block, whose input is gated.
        follows: the site whose gate is used again, behind a depthwise convolution of what that one gates.
    """

    name: str
    node: fx.Node
    readers: set[fx.Node] | None = None
    follows: Site | None = None
    is_block: bool = False


class SiteFinder:
    """Walks the convolutions of a graph; ``skipped`` collects the reasons."""

    def __init__(self, flow: Flow, branches: list[Branch], selection: Selection) -> None:
        self.flow = flow
        self.branches = branches
        self.selection = selection
        self.skipped: dict[str, str] = {}
        self.calls = Counter(str(n.target) for n in self._nodes() if n.op == "call_module")
        self.owners = self._readers_of_parameters()
        self.shortcut_nodes = {n for branch in branches for n in branch.shortcut_nodes}
        # An identity shortcut carries these on to every later block: a channel closed here alone saves nothing.
        self.stream_nodes = {n for b in branches if not b.shortcut_nodes for n in self._origin(b.entry)}
        self.pooled = self._pooled()
        self.final = self._final()

    def _readers_of_parameters(self) -> Counter[int]:
        """How many layers of the graph hold each parameter; what only the original's code reads does not count."""
        root = self.flow.graph_module
        called = {m for path in self.calls for m in root.get_submodule(path).modules()}
        read = {str(n.target) for n in self._nodes() if n.op == "get_attr"}
        count = Counter(id(p) for module in called for p in module.parameters(recurse=False))
        return count + Counter(id(attribute(root, path)) for path in read)

    def find(self, position: str) -> list[Site]:
        """The sites for one of the positions "after", "middle", "before"."""
        if position == "before":
            return self._before()
        sites: list[Site] = []
        gated: dict[fx.Node, Site] = {}
        for node in self._nodes():
            if self.flow.kind(node) not in ("conv", "linear"):
                module = submodule(node)
                if isinstance(module, nn.modules.conv._ConvTransposeNd):
                    self.skipped[str(node.target)] = "a transposed convolution"
                elif isinstance(module, nn.modules.conv._ConvNd):
                    self.skipped[str(node.target)] = _why_no_conv(module)
                continue
            name = scope_of(node) or node.name
            reason = self._reason(node, name)
            target = self._target(node, position) if not reason else None
            leader = self._leader(node, gated)
            if target is not None and leader is not None and target not in gated:
                gated[target] = leader
                sites.append(Site(name, target, follows=leader))
                self.skipped[name] = f"depthwise: the gate of {leader.name} closes its channels too"
                continue
            if target is None:
                self.skipped[name] = reason or "no activation follows inside its branch"
                continue
            if target in self.stream_nodes:
                self.skipped[name] = "identity shortcuts carry its output on"
                continue
            if target in gated:
                self.skipped[name] = "another layer's gate is in the same place"
                continue
            gated[target] = Site(scope_of(target) or name, target)
            sites.append(gated[target])
        return sites

    def _before(self) -> list[Site]:
        sites = []
        inside = {n for branch in self.branches for n in branch.nodes}
        for branch in self.branches:
            module = self.flow.graph_module.get_submodule(branch.name)
            name = branch.name or branch.addition.name
            reason = self.selection.reason(name, module)
            if branch.entry.op == "placeholder":
                reason = "it reads the model's input"
            if reason:
                self.skipped[name] = reason
            else:
                readers = {n for n in branch.entry.users if n in branch.nodes}
                sites.append(Site(branch.name, branch.entry, readers, is_block=True))
        for node in self._nodes():
            if self.flow.kind(node) not in ("conv", "linear") or node in inside:
                continue
            name, source = scope_of(node) or node.name, node.all_input_nodes[0]
            reason = self._reason(node, name, output=False)
            if not reason and source.op == "placeholder":
                reason = "it reads the model's input"
            if reason:
                self.skipped[name] = reason
            else:
                sites.append(Site(name, source, {node}))
        return sites

    def _nodes(self) -> list[fx.Node]:
        return list(self.flow.graph_module.graph.nodes)

    def _reason(self, node: fx.Node, name: str, *, output: bool = True) -> str:
        """Why this convolution is left alone; empty if it is not."""
        module = submodule(node)
        owner = module if module is not None else self.flow.graph_module.get_submodule(name)
        parameters = list(module.parameters(recurse=False)) if module is not None else []
        channels, value = self.flow[node], node.meta["val"]
        if chosen := self.selection.reason(name, owner):
            return chosen
        if self.flow.kind(node) == "linear" and value.dim() != 4:
            return "a dense layer"
        if node.op == "call_module" and self.calls[str(node.target)] > 1:
            return f"called {self.calls[str(node.target)]} times: its weights are shared"
        if any(self.owners[id(p)] > 1 for p in parameters):
            return "its weights are shared with another layer"
        if parameters and not any(p.requires_grad for p in parameters):
            return "its weights are frozen (requires_grad=False)"
        if node in self.pooled:
            return "it works on pooled 1x1 maps"
        if node in self.shortcut_nodes:
            return "the shortcut of a residual block"
        if output and channels.size < 2:
            return "a single output channel"
        if output and node in self.final:
            return "its channels are the model's outputs"
        return ""

    def _leader(self, node: fx.Node, gated: dict[fx.Node, Site]) -> Site | None:
        """Of a depthwise convolution, the site that gates its input."""
        module = submodule(node)
        if not (isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1):
            return None
        return next((gated[n] for n in self._origin(node.all_input_nodes[0]) if n in gated), None)

    def _origin(self, node: fx.Node) -> set[fx.Node]:
        """The nodes from which a value comes channel by channel."""
        chain = {node}
        while self.flow.kind(node) == "channelwise" and node.all_input_nodes:
            node = node.all_input_nodes[0]
            chain.add(node)
        return chain

    def _target(self, node: fx.Node, position: str) -> fx.Node | None:
        """The node to gate: the norm after the convolution or, in the middle, the activation after that."""
        current = node
        if (norm := _only_user(current)) is not None and isinstance(submodule(norm), NORMS + MIXING_NORMS):
            current = norm
        if position == "after":
            return current
        user = _only_user(current)
        return user if user is not None and is_activation(user) else None

    def _pooled(self) -> set[fx.Node]:
        """Nodes whose value is made of global averages alone, as inside squeeze-excite."""
        pooled: set[fx.Node] = set()
        for node in self._nodes():
            sources = [n for n in node.all_input_nodes if self.flow.has_channels(n)]
            if _is_global_pool(node) or (sources and all(n in pooled for n in sources)):
                pooled.add(node)
        return pooled

    def _final(self) -> set[fx.Node]:
        """Nodes whose channels reach the model's output one by one."""
        final: set[fx.Node] = set()
        for node in reversed(self._nodes()):
            if any(
                u.op == "output" or (u in final and self.flow.kind(u) in ("channelwise", "move")) for u in node.users
            ):
                final.add(node)
        return final


def is_activation(node: fx.Node) -> bool:
    """Whether the node is an activation function, as a module or a call."""
    if node.op == "call_module":
        return isinstance(submodule(node), ACTIVATIONS + (nn.PReLU,))
    names = (
        "relu",
        "relu6",
        "silu",
        "gelu",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "leaky_relu",
        "elu",
        "mish",
    )
    return node.op in ("call_function", "call_method") and op_name(node) in names


def _why_no_conv(module: nn.modules.conv._ConvNd) -> str:
    if has_own_hooks(module):
        return "it has hooks, which may change what it returns"
    if isinstance(module, nn.Conv2d) and not is_conv(module):
        return f"a {type(module).__name__}, whose code is its own"
    if not isinstance(module, nn.Conv2d):
        return f"a {type(module).__name__}: only two-dimensional convolutions are gated"
    return "its input is no image with channels in dimension 1"


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_global_pool(node: fx.Node) -> bool:
    module = submodule(node)
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        return module.output_size in (1, (1, 1))
    if node.op == "call_module":
        return False
    if node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        return node.args[1:2] in ((1,), ((1, 1),)) or node.kwargs.get("output_size") in (1, (1, 1))
    if node.op in ("call_function", "call_method") and op_name(node) in ("mean", "amax", "adaptive_avg_pool2d"):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dim, (tuple, list)) and {d for d in dim if isinstance(d, int)} in ({2, 3}, {-1, -2}, {1})
    return False


def open_gate(gate: LearnedGate) -> Gate:
    """Set a new gate to open whatever it reads: its logits are 0.5, inside the estimators' windows.

    Features of a pretrained network can be of any magnitude, so the last layer's weights start at zero.
    ``batch_mean`` compares logits with each other and would find all of them equal: it gets tiny ones.
    """
    if gate.estimator.name == "batch_mean":
        with torch.no_grad():
            gate.fc2.weight.mul_(1e-3)
    else:
        nn.init.zeros_(gate.fc2.weight)
    return gate
