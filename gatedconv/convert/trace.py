"""From a model to its torch.fx graph, whatever the model does with the sizes of its tensors."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gatedconv.gating import Gate
from gatedconv.nn import (
    AddBranch,
    AppendOnes,
    ChannelBias,
    Constant,
    ConstantMap,
    Conv2d,
    FrozenConv2d,
    GatherChannels,
    ScatterAdd,
    ScatterChannels,
    SelectOpen,
    StochasticDepth,
)

TRACED_BATCH = 2  # a batch of one would be taken for a dimension that broadcasts

OWN_LEAVES: tuple[type[nn.Module], ...] = (
    AddBranch,
    AppendOnes,
    ChannelBias,
    Constant,
    ConstantMap,
    FrozenConv2d,
    Gate,
    GatherChannels,
    ScatterAdd,
    ScatterChannels,
    SelectOpen,
    StochasticDepth,
)


class TraceFailure(ValueError):
    """The model cannot be written down as a graph; the message says why."""


def trace(model: nn.Module, example_input: Tensor) -> tuple[fx.GraphModule, str]:
    """The eval-mode graph of ``model``, which may be changed and is shared by the result.

    First symbolic tracing; a submodule whose code asks for sizes is traced with those of
    ``example_input`` (the batch size stays free), and one that even so cannot be followed stays a single
    call. Where the model as a whole cannot be followed, ``torch.export`` writes the graph.

    Every node's ``meta["val"]`` holds its value on two fake images.

    Returns:
        the graph, and "fx" or "export".

    Raises:
        TraceFailure: neither of them can.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        try:
            with quiet():
                graph_module = _symbolic(model, example_input)
                _check_batch(graph_module, example_input)
            return graph_module, "fx"
        except Exception as error:  # whatever the model's code raises on a proxy
            reason = _first_line(error)
        try:
            return _exported(model, example_input), "export"
        except Exception as error:
            raise TraceFailure(f"torch.fx: {reason}; torch.export: {_first_line(error)}") from error
    finally:
        for module, flag in training.items():
            module.training = flag


def _check_batch(graph_module: fx.GraphModule, example_input: Tensor) -> None:
    """Raise, or not, as the graph does for a batch of another size than the traced one."""
    found = {node: node.meta.get("val") for node in graph_module.graph.nodes}
    evaluate_shapes(graph_module, example_input, TRACED_BATCH + 1)
    for node, value in found.items():
        node.meta["val"] = value


def evaluate_shapes(graph_module: fx.GraphModule, example_input: Tensor, batch: int = TRACED_BATCH) -> None:
    """Write ``meta["val"]`` of every node: a fake tensor, as so many images like the example give."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        values: dict[fx.Node, Any] = {}
        for node in graph_module.graph.nodes:
            values[node] = _fake_value(node, graph_module, example_input, batch)
            node.meta["val"] = values[node]


def _fake_value(node: fx.Node, root: nn.Module, example_input: Tensor, batch: int = TRACED_BATCH) -> Any:
    if node.op == "placeholder":
        shape = (batch, *example_input.shape[1:])
        return torch.empty(shape, dtype=example_input.dtype, device=example_input.device)
    if node.op == "get_attr":
        return attribute(root, str(node.target))
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if node.op == "output":
        return args[0]
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = root.get_submodule(str(node.target))
    if isinstance(module, Gate):  # a call would leave its decision on the gate
        return args[0].new_empty((args[0].shape[0], module.num_gates))
    if isinstance(module, (SelectOpen, AddBranch)):  # as if every sample were open
        return args[0]
    if isinstance(module, Conv2d):  # whatever its gate closes, the shape is the same
        return nn.Conv2d.forward(module, *args)
    return module(*args, **kwargs)


def attribute(root: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _symbolic(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    tracer = SizeAwareTracer(example_input)
    try:
        with torch.no_grad():
            graph = tracer.trace(model)
    except Exception:
        tracer = SizeAwareTracer(example_input, concrete=True)
        with torch.no_grad():
            graph = tracer.trace(model)
    return fx.GraphModule(model, graph, type(model).__name__)


def _exported(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    example = example_input.detach()[:1].expand(TRACED_BATCH, *example_input.shape[1:]).contiguous()
    with torch.no_grad(), quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    module = program.module(check_guards=False)
    # A plain graph module: the exported one carries its own calling convention and refuses train().
    graph = copy.deepcopy(module.graph)
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_module" and "guard" in str(node.target):
            graph.erase_node(node)
        elif node.op == "output" and isinstance(node.args[0], (tuple, list)) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)
    result = fx.GraphModule(module, graph, type(model).__name__)
    evaluate_shapes(result, example_input)
    return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A failed trace writes its graph and its stack to the log and to stderr; the exception says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


class SizedProxy(fx.Proxy):
    """A proxy that knows the sizes of the tensor it stands for.

    ``ndim``, ``dtype`` and ``device`` are always known. Sizes are nodes of the graph, so that the graph
    works for other ones, unless the tracer is in its concrete mode: then all but the batch are numbers.
    """

    @property
    def shape(self) -> Any:
        """Sizes, the first one always a node."""
        if not self._is_sized():
            return fx.proxy.Attribute(self, "shape")
        value = self.node.meta["val"]
        return tuple(self._size(dim) for dim in range(value.dim()))

    def size(self, dim: int | None = None) -> Any:
        """As ``Tensor.size``."""
        if not self._is_sized():
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        return self.shape if dim is None else self._size(dim % self.node.meta["val"].dim())

    def dim(self) -> Any:
        """As ``Tensor.dim``."""
        value = self.node.meta.get("val")
        if isinstance(value, Tensor):
            return value.dim()
        return self.tracer.create_proxy("call_method", "dim", (self,), {})

    ndimension = dim

    @property
    def ndim(self) -> Any:
        """As ``Tensor.ndim``."""
        return self._known("ndim")

    @property
    def dtype(self) -> Any:
        """As ``Tensor.dtype``."""
        return self._known("dtype")

    @property
    def device(self) -> Any:
        """As ``Tensor.device``."""
        return self._known("device")

    def _known(self, name: str) -> Any:
        value = self.node.meta.get("val")
        return getattr(value, name) if isinstance(value, Tensor) else fx.proxy.Attribute(self, name)

    def _is_sized(self) -> bool:
        return bool(getattr(self.tracer, "concrete", False)) and isinstance(self.node.meta.get("val"), Tensor)

    def _size(self, dim: int) -> Any:
        if dim == 0:
            return self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return int(self.node.meta["val"].shape[dim])


class SizeAwareTracer(fx.Tracer):
    """A tracer that evaluates shapes as it goes and falls back module by module."""

    def __init__(self, example_input: Tensor, *, concrete: bool = False) -> None:
        super().__init__(param_shapes_constant=True)
        self.example_input = example_input
        self.concrete = concrete
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.evaluating = False
        self.parameter_proxies: dict[str, fx.Proxy] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch.nn's own modules, gates and our tiny modules; and what behaves differently in training."""
        if isinstance(m, OWN_LEAVES) or (isinstance(m, Conv2d) and m.gate is not None):
            return True
        if type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential):
            return True
        return is_random_drop(m)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One image input; every other argument of the model keeps its default."""
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Our kind of proxy."""
        return SizedProxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Create the node and work out its value's shape."""
        node = super().create_node(kind, *args, **kwargs)
        self.evaluating = True
        try:
            with self.fake:
                node.meta["val"] = _fake_value(node, self.root, self.example_input)
        finally:
            self.evaluating = False
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters become nodes, except while a node is evaluated."""
        return attr_val if self.evaluating else super().getattr(attr, attr_val, self.parameter_proxies)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into the module; if that fails, again with sizes known; if that fails too, keep the call."""
        if self.evaluating:
            return forward(*args, **kwargs)
        mark = next(iter(reversed(self.graph.nodes)))
        state = (copy.copy(self.module_stack), copy.copy(self.scope), dict(self.num_calls))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self._roll_back(mark, state)
        if not self.concrete:
            self.concrete = True
            try:
                return super().call_module(m, forward, args, kwargs)
            except Exception:
                self._roll_back(mark, state)
            finally:
                self.concrete = False
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def _roll_back(self, mark: fx.Node, state: tuple[Any, Any, dict[str, int]]) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is mark:
                break
            self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        self.parameter_proxies = {k: p for k, p in self.parameter_proxies.items() if p.node in alive}
        self.module_stack, self.num_calls = copy.copy(state[0]), dict(state[2])
        self.scope.module_path, self.scope.module_type = state[1].module_path, state[1].module_type


def is_random_drop(module: nn.Module) -> bool:
    """Whether this layer changes its input in training alone: drop-path, drop-block, noise; nothing that learns."""
    if any(True for _ in module.children()) or module.state_dict() or type(module).__module__.startswith("torch.nn"):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names and _is_identity_in_eval(module)


def fixed_to_eval(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Modules whose own code asks for ``self.training``, which the trace answered once, as in eval; "" for the model.

    Those that the graph still calls are asked again at every call.
    """
    called = tuple(f"{node.target}." for node in graph.nodes if node.op == "call_module")
    names = [name for name, module in model.named_modules() if _asks_for_training(module)]
    return [name for name in names if not f"{name}.".startswith(called)]


def _asks_for_training(module: nn.Module) -> bool:
    if isinstance(module, fx.GraphModule):
        return False
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] in ("torch", "gatedconv"):
            return False
        for name, function in vars(cls).items():
            code = getattr(function, "__code__", None)
            if code is not None and "training" in code.co_names and name not in ("__init__", "train", "eval"):
                return True
    return False


@torch.no_grad()
def _is_identity_in_eval(module: nn.Module) -> bool:
    """Found by trial: a layer may as well ask ``self.training`` for a sigmoid that it applies in eval alone."""
    training, probe = module.training, torch.linspace(-300.0, 300.0, 96).reshape(2, 3, 4, 4)
    try:
        module.training = False
        result = type(module).forward(module, probe.clone())
        return isinstance(result, Tensor) and torch.equal(result, probe)
    except Exception:  # whatever the layer says of an input that it did not expect
        return False
    finally:
        module.training = training


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
