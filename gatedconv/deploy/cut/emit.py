"""Writing the smaller graph: every node again, on the channels that are left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import free_path, op_name, scope_of, set_module, submodule
from gatedconv.convert.flow import Flow
from gatedconv.deploy.cut.demand import Demand
from gatedconv.deploy.cut.facts import Facts
from gatedconv.deploy.cut.layers import cut_channelwise
from gatedconv.nn import Constant, GatherChannels, ScatterChannels


@dataclass(eq=False)
class Physical:
    """A node of the new graph and the channels of the old node that it holds, ascending."""

    node: fx.Node
    layout: Tensor


class Emitter:
    """Builds the new graph; rules for single kinds of nodes are in ``rules``."""

    def __init__(self, flow: Flow, facts: Facts, demand: Demand) -> None:
        self.flow, self.facts, self.demand = flow, facts, demand
        self.old: fx.GraphModule = flow.graph_module
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.physical: dict[fx.Node, Physical] = {}
        self.plain: dict[fx.Node, Any] = {}  # whole values: sizes, constants, deferred tensors
        self.laid_out: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        self.scope = ""
        self.image: fx.Node | None = None
        self.is_sized = demand.is_sized()  # whether the result is for the example's height and width alone

    def run(self, rules: dict[str, Callable[[Emitter, fx.Node, Tensor], Physical]]) -> fx.GraphModule:
        """Emit every node that is wanted."""
        for node in self.old.graph.nodes:
            scope = scope_of(node)
            self.scope = scope.rpartition(".")[0] if node.op == "call_module" else scope
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], self.whole))
            elif self.flow.has_channels(node):
                wanted = self.demand.wanted(node)
                if wanted.numel():
                    self.physical[node] = rules[self.flow.kind(node)](self, node, wanted)
        return fx.GraphModule(self.root, self.graph)

    def _placeholder(self, node: fx.Node) -> None:
        new = self.graph.placeholder(node.name)
        self.image = self.image or new
        if self.flow.has_channels(node):
            self.physical[node] = Physical(new, torch.arange(self.flow[node].size))
        else:
            self.plain[node] = new

    # -- values --------------------------------------------------------------------------------------

    def whole(self, node: fx.Node) -> Any:
        """The node's value with all its channels."""
        if self.flow.has_channels(node):
            return self.lay_out(node, torch.arange(self.flow[node].size))
        if node not in self.plain:
            kind = self.flow.kind(node)
            self.plain[node] = self._constant(node) if kind == "constant" else self.again(node, node.args, node.kwargs)
        return self.plain[node]

    def lay_out(self, node: fx.Node, wanted: Tensor) -> fx.Node:
        """The node's value with exactly the channels ``wanted``, constants among them."""
        key = (node, tuple(wanted.tolist()))
        if key not in self.laid_out:
            self.laid_out[key] = self._lay_out(node, wanted)
        return self.laid_out[key]

    def _lay_out(self, node: fx.Node, wanted: Tensor) -> fx.Node:
        axis, have = self.flow[node].axis, self.layout(node)
        if torch.equal(have, wanted):
            return self.physical[node].node
        present = torch.isin(wanted, have)
        if bool(present.all()):
            return self._gather(self.physical[node].node, torch.searchsorted(have, wanted), axis)
        values = self.facts.values(node, wanted)
        if not bool(present.any()):
            shape = [1, *node.meta["val"].shape[1:]]
            shape[axis] = len(wanted)
            self.is_sized |= len(shape) > 2
            return self.call(Constant(values.expand(shape).contiguous()), "constant", self.image)
        part = self.lay_out(node, wanted[present])
        absent = present.logical_not()
        shaped = [-1 if d == axis else 1 for d in range(values.dim())]
        fill = torch.where(absent.reshape(shaped), values, torch.zeros((), dtype=values.dtype))
        return self.call(ScatterChannels(present.nonzero().flatten(), fill, axis), "scatter", part)

    def _gather(self, node: fx.Node, positions: Tensor, axis: int) -> fx.Node:
        if bool((positions.diff() == 1).all()):
            return self.graph.call_method("narrow", (node, axis, int(positions[0]), len(positions)))
        return self.call(GatherChannels(positions, axis), "gather", node)

    def layout(self, node: fx.Node) -> Tensor:
        """The channels of a node that the new graph holds."""
        found = self.physical.get(node)
        return found.layout if found is not None else torch.zeros(0, dtype=torch.long)

    def _constant(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return self.parameter(self.facts.constant(node), str(node.target))
        return self.parameter(self.facts.constant(node), f"{scope_of(node)}.constant".lstrip("."))

    # -- new nodes -----------------------------------------------------------------------------------

    def call(self, module: nn.Module, name: str, *args: Any) -> fx.Node:
        """A call of a new module, named after the place of the node that needs it."""
        scope = self.scope
        path = free_path(self.root, f"{scope}.{name}" if scope else name)
        return self.call_at(module, path, *args)

    def call_at(self, module: nn.Module, path: str, *args: Any) -> fx.Node:
        """A call of a module at a path; another one of the name gets a number."""
        existing = _existing(self.root, path)
        if existing is not module:
            path = path if existing is None or not _is_used(existing) else free_path(self.root, path)
            _keep_children(existing, module)
            set_module(self.root, path, module)
        return self.graph.create_node("call_module", path, args)

    def parameter(self, value: Any, path: str) -> fx.Node:
        """A read of a parameter or buffer, stored under the path or the next free one."""
        if not isinstance(value, Tensor):
            return value  # type: ignore[no-any-return]
        owner, _, name = path.rpartition(".")
        existing = _existing(self.root, owner)
        if existing is None:
            set_module(self.root, owner, nn.Module())
        elif owner and type(existing) is not nn.Module:  # a layer has no place for what is not its own
            owner, _, layer = owner.rpartition(".")
            name = f"{layer}_{name}"
            path = f"{owner}.{name}".lstrip(".")
        holder = self.root.get_submodule(owner)
        if getattr(holder, name, None) is not value:
            path = free_path(self.root, path)
            name = path.rpartition(".")[2]
            if isinstance(value, nn.Parameter):
                holder.register_parameter(name, value)
            else:
                holder.register_buffer(name, value.detach().clone())
        return self.graph.get_attr(path)

    def again(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The old node's operation on whole values; sizes are those of the old, whole tensors."""
        if self.flow.kind(node) == "size":
            return self._size(node)  # type: ignore[no-any-return]
        new_args, new_kwargs = fx.node.map_arg((args, kwargs), self.whole)
        if node.op == "call_module":
            new = self.call_at(submodule(node), str(node.target), *new_args)  # type: ignore[arg-type]
            new.kwargs = new_kwargs
            return new
        return self.graph.create_node(node.op, node.target, new_args, new_kwargs)

    def on_first(self, node: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
        """The old node's operation with ``value`` in place of its input ``source``, sizes as they were."""

        def replace(n: fx.Node) -> Any:
            return value if n is source else self.whole(n)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), replace)
        if node.op == "call_module":
            return self.call_at(submodule(node), str(node.target), *args)  # type: ignore[arg-type]
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def on_channels(self, node: fx.Node, source: fx.Node, value: fx.Node, wanted: Tensor) -> fx.Node:
        """``on_first`` for a module or function with numbers per channel, cut to ``wanted``."""
        module, size = submodule(node), self.flow[source].size
        if module is None or len(wanted) == size:
            return self.on_first(node, source, value)
        return self.call_at(cut_channelwise(module, wanted, size), str(node.target), value)

    # -- sizes ---------------------------------------------------------------------------------------

    def _size(self, node: fx.Node) -> Any:
        """A size node: numbers for channels, reads of the new tensors for the other dimensions."""
        name = op_name(node)
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), Tensor):
            if name == "size" and len(node.args) > 1:
                return self._dimension(source, int(node.args[1]))  # type: ignore[arg-type]
            if name in ("size", "sym_size") or (name == "getattr" and node.args[1] == "shape"):
                if name == "sym_size":
                    return self._dimension(source, int(node.args[1]))  # type: ignore[arg-type]
                return tuple(self._dimension(source, d) for d in range(source.meta["val"].dim()))
            self.is_sized |= name in ("numel", "nelement")
            return node.meta["val"]  # dim(), dtype, device, numel() and the like
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.whole)
        if not _has_nodes((args, kwargs)) or (name == "getitem" and isinstance(args[0], tuple)):
            return node.target(*args, **kwargs) if node.op == "call_function" else node.meta["val"]  # type: ignore
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def _dimension(self, source: fx.Node, dim: int) -> Any:
        value = source.meta["val"]
        dim %= value.dim()
        channels = self.flow[source]
        if dim == channels.axis:
            return int(value.shape[dim])
        held = self.physical.get(source)
        if held is not None:
            return self.graph.call_method("size", (held.node, dim))
        if not self.flow.has_channels(source) and self.flow.kind(source) != "constant":
            return self.graph.call_method("size", (self.whole(source), dim))
        if dim == 0 and value.shape[0] == self._batch():
            return self.graph.call_method("size", (self.image, 0))
        self.is_sized |= self.flow.kind(source) != "constant"
        return int(value.shape[dim])

    def _batch(self) -> int:
        placeholder = next(n for n in self.old.graph.nodes if n.op == "placeholder")
        return int(placeholder.meta["val"].shape[0])


def _existing(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _is_used(module: nn.Module) -> bool:
    """Whether a module is more than a container that was made on the way to another path."""
    return type(module) is not nn.Module or bool(module._parameters or module._buffers)


def _keep_children(existing: nn.Module | None, module: nn.Module) -> None:
    """A container gives its children to the layer that takes its path."""
    for name, child in existing.named_children() if existing is not None and not _is_used(existing) else ():
        module.add_module(name, child)


def _has_nodes(values: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return bool(found)
