"""Records the operations of one run of a model's own code.

Nothing is traced symbolically: the model runs, whatever its code does, and every operation that PyTorch
dispatches is noted with the module in whose forward it ran. Known layers count as one operation each. The
record serves to find places for gates and channels that can go, and graphs are written from several of them; the
model itself stays as it is.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map

from gatedconv.convert.module_kinds import is_known
from gatedconv.gating import eval_mode

_RECORDING = threading.RLock()  # records replace nn.Module.__call__ for their time

_GIVERS = ("tolist", "numpy", "__array__")  # methods that take numbers of a tensor past the dispatcher
_NUMBERS = ("_local_scalar_dense", "equal")  # operations that give the model's code numbers of a tensor
CALL = "call"  # the operation of a node that is the call of a known layer


class SharedWithOriginal(ValueError):
    """A copy of a model reads weights of the original."""


@dataclass(eq=False)
class Value:
    """A tensor at one moment: the result of a node, or a constant (``node`` is None).

    Attributes:
        tensor: the recorded tensor; its numbers may have been overwritten since.
        name: of a constant, its path in the model's state; "" for others.
        numbers: of a constant without a name, a copy of it as it was when it was first read.
    """

    tensor: Tensor = field(repr=False)
    node: Node | None = field(default=None, repr=False)
    index: int = 0
    name: str = ""
    numbers: Tensor | None = field(default=None, repr=False)
    users: list[Node] = field(default_factory=list, repr=False)

    @property
    def is_constant(self) -> bool:
        """Whether no input of the model can change it."""
        return self.node is None or self.node.is_constant


@dataclass(eq=False)
class Node:
    """One operation, with ``Value`` in place of tensors among its arguments.

    Attributes:
        op: "input", "output", "call" for a known layer, "overwritten" for what an in-place operation did to another
            view (its arguments: that view, the result of the operation, and what that wrote to, as it was before),
            "same" for a module that returned its input; else the name of an ATen operation.
        scope: path of the module in whose forward it ran; of the layer itself for "call".
        module: the layer that was called, or None.
    """

    op: str
    scope: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    func: Any = None
    outputs: list[Value] = field(default_factory=list)
    places: list[tuple[Any, ...]] = field(default_factory=list)  # of the outputs in what it returned
    inputs: list[Value] = field(default_factory=list)
    is_constant: bool = False
    order: int = 0

    def __repr__(self) -> str:
        return f"Node({self.op}, {self.scope!r})"


@dataclass(eq=False)
class ModuleCall:
    """One call of a module: the values that went in and out, and the orders of its nodes: first <= order < last.

    ``is_plain``: its first argument and its result are tensors, which hooks can replace.
    """

    path: str
    module: nn.Module
    inputs: list[Value]
    outputs: list[Value]
    first: int
    last: int
    is_plain: bool = True


class Record:
    """The nodes of one run in order, the calls of modules, inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.nodes: list[Node] = []
        self.calls: dict[str, list[ModuleCall]] = {}
        self.layers: dict[str, list[Node]] = {}  # the calls of known layers
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.returned: Any = None  # what the model returned
        self.structure: Any = None  # the same, with values in place of tensors
        self.knows_numbers_at: int | None = None  # order of the first node after its code took computed numbers
        self.reads_by_channel: dict[str, bool] = {}  # found by `convert.channels.Sliceable`

    def calls_of(self, path: str) -> list[ModuleCall]:
        """The calls of the module at a path."""
        return self.calls.get(path, [])

    def same_layer(self, node: Node) -> list[Node]:
        """The calls of a node's layer in order, this one among them; of any other operation the node alone."""
        return self.layers[node.scope] if node.op == CALL else [node]

    def is_late(self, node: Node) -> bool:
        """Whether a node ran after the model's code had read the numbers of a tensor, on which it may branch."""
        since = self.knows_numbers_at
        return since is not None and node.order >= since and node.op != "output"

    @property
    def read_by_code(self) -> set[str]:
        """Paths of modules whose parameters or buffers operations of the model's code read."""
        return {v.name.rpartition(".")[0] for n in self.nodes if n.op != CALL for v in n.inputs if v.name}

    @property
    def may_skip_layers(self) -> bool:
        """Whether the model's code read the numbers of a tensor, and some layers with parameters did not run."""
        if self.knows_numbers_at is None:
            return False
        ran = self.calls.keys() | self.read_by_code
        return any(
            module._parameters and path not in ran and not any(path.startswith(f"{layer}.") for layer in self.layers)
            for path, module in self.model.named_modules()
        )

    @property
    def may_call_again(self) -> bool:
        """Whether layers with parameters ran after the model's code had read the numbers of a tensor."""
        return any(n.module is not None and n.module._parameters for n in self.nodes if self.is_late(n))

    def nodes_of(self, call: ModuleCall) -> list[Node]:
        """The operations that ran inside a call."""
        first = bisect_left(self.nodes, call.first, key=lambda node: node.order)
        return self.nodes[first : bisect_left(self.nodes, call.last, key=lambda node: node.order)]

    def producers(self, value: Value) -> list[ModuleCall]:
        """The calls of modules that returned this very value, the innermost first."""
        found = [c for calls in self.calls.values() for c in calls if c.is_plain and value in c.outputs]
        return sorted(found, key=lambda call: call.last - call.first)

    def readers(self, value: Value) -> list[ModuleCall]:
        """The calls of modules that were given this very value, the innermost first."""
        found = [c for calls in self.calls.values() for c in calls if c.is_plain and value in c.inputs]
        return sorted(found, key=lambda call: call.last - call.first)


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    known: Callable[[nn.Module], bool] = is_known,
    original: nn.Module | None = None,
) -> Record:
    """Run the model in eval mode, without gradients, and note what it computes; ``known`` layers as one node each.

    Args:
        model: runs once, which may change its state.
        args: positional arguments.
        kwargs: keyword arguments.
        known: which modules count as one operation each.
        original: of which the model is a copy; its weights may not be read.

    Raises:
        SharedWithOriginal: the model reads weights of the original.
        Exception: whatever the model's own code raises.
    """
    result = Record(model)
    recorder = _Recorder(result, known, original)
    with _RECORDING, eval_mode(model), _quiet(original), torch.inference_mode(False), torch.no_grad():
        # A compiled part would hide its operations. The stance acts as soon as it is made.
        with torch.compiler.set_stance("force_eager"), recorder.watching_modules():
            recorder.start(args, dict(kwargs or {}))
    _forget_unread(result)
    return result


@contextmanager
def _quiet(original: nn.Module | None) -> Iterator[None]:
    """Put the original in eval mode, so that a copy that wrongly calls its layers cannot change their statistics."""
    training = {} if original is None else {module: module.training for module in original.modules()}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _forget_unread(result: Record) -> None:
    """Ignore in-place changes of views that are not read afterwards."""
    for node in reversed(list(result.nodes)):
        if node.op == "overwritten" and not any(value.users for value in node.outputs):
            for value in node.inputs:
                value.users.remove(node)
            result.nodes.remove(node)


class _Recorder(TorchDispatchMode):
    def __init__(self, result: Record, known: Callable[[nn.Module], bool], original: nn.Module | None) -> None:
        super().__init__()
        named = () if original is None else (*original.named_parameters(), *original.named_buffers())
        self.foreign = {memory: name for name, tensor in named if (memory := _memory(tensor))}
        self.result = result
        self.known = known
        self.paths = {id(m): name for name, m in result.model.named_modules()}
        self.values: dict[int, Value] = {}
        self.storages: dict[int, list[Value]] = {}
        self.scopes: list[str] = [""]
        self.quiet = 0  # inside a known layer, whose own operations are not noted
        for name, tensor in (*result.model.named_parameters(), *result.model.named_buffers()):
            self._keep(Value(tensor, name=name))

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = Node("input", "")
        args, kwargs = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (args, kwargs))
        self._append(given, [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)], set())
        self.result.inputs = given.outputs
        with self:
            out = self.result.model(*args, **kwargs)
        node = Node("output", "")
        self.result.returned, self.result.structure = out, self._read(node, open_up(out))
        self.result.outputs = node.inputs
        node.order = len(self.result.nodes)
        self.result.nodes.append(node)

    # -- operations ------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for item in () if self.quiet else tree_flatten((args, kwargs))[0]:
            if isinstance(item, Tensor) and id(item) not in self.values:
                self._constant(item)  # before an operation in place changes its numbers
        out = func(*args, **kwargs)
        if self.quiet:
            return out
        node = Node(func._schema.name.split("::")[1], self.scopes[-1], func=func)
        node.args, node.kwargs = self._read(node, tuple(args)), self._read(node, dict(kwargs))
        if not node.inputs:
            return out  # a new tensor, made of numbers: recorded as a constant when it is read
        if node.op in _NUMBERS:
            self._note_numbers(node.inputs)
        written = {id(t) for t in _written(func, args, kwargs)}
        node.places = _places(out)
        self._append(node, [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)], written)
        return out

    def _note_numbers(self, values: Iterable[Value | None]) -> None:
        """Note that the model's code reads the numbers of tensors; None stands for a tensor that is not recorded."""
        if self.result.knows_numbers_at is None and any(v is not None and not v.is_constant for v in values):
            self.result.knows_numbers_at = len(self.result.nodes)

    def _read(self, node: Node, structure: Any) -> Any:
        def look_up(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            value = self.values.get(id(item)) or self._constant(item)
            node.inputs.append(value)
            value.users.append(node)
            return value

        return tree_map(look_up, structure)

    def _constant(self, tensor: Tensor) -> Value:
        """The value of a tensor that no recorded operation made."""
        if _memory(tensor) in self.foreign:
            raise SharedWithOriginal(
                f"{type(self.result.model).__name__} keeps a function or an object that holds its layers, which a "
                f"copy shares ({self.foreign[_memory(tensor)]}); hold layers as attributes of modules instead"
            )
        self.quiet += 1
        numbers = tensor.detach().clone()
        self.quiet -= 1
        return self._keep(Value(tensor, numbers=numbers))

    def _append(self, node: Node, outputs: list[Tensor], written: set[int]) -> None:
        node.order = len(self.result.nodes)
        node.is_constant = bool(node.inputs) and all(v.is_constant for v in node.inputs)
        self.result.nodes.append(node)
        if node.op == CALL:
            self.result.layers.setdefault(node.scope, []).append(node)
        for index, tensor in enumerate(outputs):
            node.outputs.append(self._keep(Value(tensor, node, index)))
        for tensor in outputs:
            if id(tensor) in written:
                self._overwrite(node, tensor)

    def _overwrite(self, node: Node, tensor: Tensor) -> None:
        """Other views of a tensor's memory changed with it."""
        mine = self.values[id(tensor)]
        before = next((value for value in node.inputs if value.tensor is tensor), None)
        for other in list(self.storages.get(_memory(tensor), ())):
            if other is mine or other.tensor is tensor or self.values.get(id(other.tensor)) is not other:
                continue
            change = Node("overwritten", node.scope, (other, mine, before), inputs=[other, mine])
            other.users.append(change)
            mine.users.append(change)
            self._append(change, [other.tensor], set())

    def _keep(self, value: Value) -> Value:
        self.values[id(value.tensor)] = value
        memory = _memory(value.tensor)
        if memory:
            self.storages.setdefault(memory, []).append(value)
        return value

    # -- modules ---------------------------------------------------------------------------------------

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Context in which every module call goes through ``_call``, and numbers that leave a tensor are noticed."""
        original = nn.Module.__call__
        own = dict(vars(Tensor))

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self.paths.get(id(module))
            if path is None or self.quiet:
                return original(module, *args, **kwargs)
            return self._call(original, path, module, args, kwargs)

        def noticed(give: Callable[..., Any]) -> Callable[..., Any]:
            def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                self._note_numbers([self.values.get(id(tensor))])
                return give(tensor, *args, **kwargs)

            return method

        nn.Module.__call__ = call  # type: ignore[method-assign]
        for name in _GIVERS:
            setattr(Tensor, name, noticed(getattr(Tensor, name)))
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
            for name in _GIVERS:
                if name in own:
                    setattr(Tensor, name, own[name])
                else:
                    delattr(Tensor, name)

    def _call(self, original: Any, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, known = len(self.result.nodes), self.known(module)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        read = Node(CALL, path, module=module)
        read.args, read.kwargs = self._read(read, args), self._read(read, kwargs)
        inputs = list(read.inputs)
        if not known:  # its own operations are noted in its place
            for value in read.inputs:
                value.users.remove(read)
        self.scopes.append(path)
        self.quiet += known
        versions = [0 if t.is_inference() else t._version for t in given]  # tensors of inference mode have no version
        try:
            out = original(module, *args, **kwargs)
        finally:
            self.scopes.pop()
            self.quiet -= known
        written = {id(t) for t, v in zip(given, versions, strict=True) if not t.is_inference() and t._version != v}
        out = tree_map(lambda t: self._apart(t, given, written, path, known), out)
        tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if known:
            read.places = _places(out)
            self._append(read, tensors, written)
        outputs = [self.values.get(id(t)) or self._constant(t) for t in tensors]
        plain = bool(args) and isinstance(args[0], Tensor) and isinstance(out, Tensor)
        self.result.calls.setdefault(path, []).append(
            ModuleCall(path, module, inputs, outputs, first, len(self.result.nodes), plain)
        )
        return out

    def _apart(self, item: Any, given: list[Tensor], written: set[int], path: str, known: bool) -> Any:
        """Give a module that returns its input a distinct output tensor, so that a hook gates the output alone."""
        if not isinstance(item, Tensor) or id(item) in written or not any(item is t for t in given):
            return item
        self.quiet += 1
        twin = item.detach()
        self.quiet -= 1
        if not known:
            node = Node("same", path)
            node.args = self._read(node, (item,))
            self._append(node, [twin], set())
        return twin


def _places(structure: Any) -> list[tuple[Any, ...]]:
    found = tree_flatten_with_path(structure)[0]
    return [
        tuple(getattr(k, "idx", getattr(k, "key", None)) for k in path) for path, t in found if isinstance(t, Tensor)
    ]


def open_up(structure: Any, _inside: frozenset[int] = frozenset()) -> Any:
    """A structure of tuples, lists and dicts, with dictionaries in place of dataclasses and other objects.

    A reference of an object to one around it becomes None.
    """
    if isinstance(structure, (Tensor, nn.Module, type)):
        return structure
    if id(structure) in _inside:
        return None
    inside = _inside | {id(structure)}
    if isinstance(structure, (list, tuple, KeysView, ValuesView, ItemsView)):
        parts = [open_up(part, inside) for part in structure]
        return tuple(parts) if isinstance(structure, tuple) else parts
    if isinstance(structure, Mapping):
        return {key: open_up(part, inside) for key, part in structure.items()}
    held = dict(getattr(structure, "__dict__", {}))
    for kind in type(structure).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        held |= {name: getattr(structure, name) for name in names if hasattr(structure, name)}
    return {key: open_up(part, inside) for key, part in held.items()} if held else structure


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and the like have none
        return 0


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes in place, by its schema."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_flatten(given)[0] if isinstance(t, Tensor)]
    return found
