"""One spelling for each operation: what a traced graph says in ten ways, said in one.

``torch.nn.Conv2d``, ``F.conv2d`` and ``aten.conv2d`` on a parameter all become calls of a ``torch.nn``
module at the path that owns the parameter, in-place operations become functional ones, and drop-path
layers become ours. ``op_name`` then names every node independently of how it was written.
"""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatedconv.convert.trace import attribute, is_random_drop
from gatedconv.gating import FrozenGate
from gatedconv.nn import Conv2d, FrozenConv2d, StochasticDepth

_PYTHON_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div",
                     "concat": "cat", "concatenate": "cat", "multiply": "mul", "subtract": "sub"}  # fmt: skip
_FUNCTIONAL = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "linear": ("input", "weight", "bias"),
    "batch_norm": {
        "functional": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        "aten": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn"),
    },
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {"bias": None, "weight": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
                             "eps": 1e-5, "momentum": 0.1, "training": False}  # fmt: skip
_DROPOUTS: dict[str, type[nn.modules.dropout._DropoutNd]] = {
    "dropout": nn.Dropout, "dropout1d": nn.Dropout1d, "dropout2d": nn.Dropout2d, "dropout3d": nn.Dropout3d,
    "feature_dropout": nn.Dropout2d, "alpha_dropout": nn.AlphaDropout, "feature_alpha_dropout": nn.FeatureAlphaDropout,
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """The operation of a call_function or call_method node: "add" for every way to write an addition."""
    if node.op == "call_method":
        name = str(node.target)
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[1]
    else:
        name = getattr(node.target, "__name__", str(node.target))
    if not name.startswith("_"):
        name = name.rstrip("_")
    return _PYTHON_OPERATORS.get(name, name)


def submodule(node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls; None for other nodes."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def canonicalize(graph_module: fx.GraphModule, source: nn.Module) -> None:
    """Rewrite the graph of ``source`` in place; modules are replaced, never changed, and share parameters."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in ("_assert", "_assert_async", "_assert_tensor_metadata",
                                                            "sym_constrain_range_for_size"):  # fmt: skip
            graph.erase_node(node)
    _make_functional(graph_module)
    for node in list(graph.nodes):
        _make_positional(graph_module, node)
        if node.op == "call_module":
            _plain_module(graph_module, node)
        elif node.op == "call_function" and op_name(node) in _FUNCTIONAL:
            _call_of_module(graph_module, node, source)
        elif node.op == "call_function" and op_name(node) in _DROPOUTS:
            _dropout_module(graph_module, node)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


def _make_positional(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """``layer(input=x)`` becomes ``layer(x)``, as does ``relu(input=x)``."""
    if node.op == "call_function" and not node.args and isinstance(node.kwargs.get("input"), fx.Node):
        node.args = (node.kwargs["input"],)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "input"}
    if node.op != "call_module" or not node.kwargs:
        return
    given = dict(node.kwargs)
    positional = list(node.args)
    names = list(inspect.signature(graph_module.get_submodule(str(node.target)).forward).parameters)
    for name in names[len(positional) :]:
        if name not in given:
            break
        positional.append(given.pop(name))
    node.args, node.kwargs = tuple(positional), given


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, creating the containers on the way."""
    *parents, name = path.split(".")
    for part in parents:
        if not isinstance(getattr(root, part, None), nn.Module):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(name, module)


def free_path(root: nn.Module, path: str) -> str:
    """``path``, or with the first number appended that no attribute has yet."""
    scope, _, name = path.rpartition(".")
    try:
        parent = root.get_submodule(scope)
    except AttributeError:
        return path
    candidate, count = name, 1
    while hasattr(parent, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return f"{scope}.{candidate}" if scope else candidate


def scope_of(node: fx.Node) -> str:
    """Path of the module whose forward the node was written in; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    if node.op == "call_module":
        return str(node.target)
    return str(entries[-1]).removeprefix("L['self'].").removeprefix("L['self']") if entries else ""


def settle_inplace(graph_module: fx.GraphModule) -> None:
    """Let modules work in place only where nobody else can see the tensor that they overwrite."""
    for node in graph_module.graph.nodes:
        module = submodule(node)
        if module is None or getattr(module, "inplace", False) is not True:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1 or not _is_fresh(source):
            plain = copy.copy(module)
            plain.inplace = False  # type: ignore[assignment]
            set_module(graph_module, str(node.target), plain)


def _is_fresh(node: fx.Node) -> bool:
    """Whether the node's value is a new tensor, and no view of one that others may read."""
    module = submodule(node)
    if module is not None:
        return isinstance(module, (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.AvgPool2d, nn.MaxPool2d))
    return node.op == "call_function" and op_name(node) in ("add", "mul", "cat", "sub")


def _make_functional(graph_module: fx.GraphModule) -> None:
    """An in-place operation's later readers read its result; then it need not be in place."""
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node in list(graph_module.graph.nodes):
        changed = _changed_in_place(graph_module, node)
        if changed is None:
            continue
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)
        _out_of_place(node)


def _changed_in_place(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not isinstance(first.meta.get("val"), Tensor):
        return None
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return first if getattr(module, "inplace", False) is True else None
    if node.op == "call_method":
        return first if str(node.target).endswith("_") and not str(node.target).endswith("__") else None
    if node.op == "call_function":
        raw = getattr(node.target, "__name__", "")
        if isinstance(node.target, torch._ops.OpOverload):
            raw = node.target._schema.name.split("::")[1]
        inplace = node.kwargs.get("inplace") is True or True in _inplace_position(node)
        return first if raw.endswith("_") or raw in ("iadd", "isub", "imul", "itruediv") or inplace else None
    return None


def _inplace_position(node: fx.Node) -> tuple[Any, ...]:
    """The value of a torch.nn.functional's positional ``inplace`` argument, if it has one."""
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    if "inplace" not in names:
        return ()
    index = names.index("inplace")
    return (node.args[index],) if len(node.args) > index else ()


def _out_of_place(node: fx.Node) -> None:
    name = op_name(node) if node.op != "call_module" else ""
    if node.op == "call_method":
        node.target = str(node.target).rstrip("_")
    elif node.op == "call_function":
        code = getattr(node.target, "__code__", None)
        if code is not None and "inplace" in code.co_varnames[: code.co_argcount]:
            index = code.co_varnames.index("inplace")
            node.args = tuple(False if i == index else a for i, a in enumerate(node.args))
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
            return
        target: Any = getattr(operator, name, None) if node.target in vars(operator).values() else None
        if name == "div" and target is None and node.target is operator.itruediv:
            target = operator.truediv
        if target is None:
            target = getattr(torch, name, None) or getattr(F, name, None)
        if isinstance(node.target, torch._ops.OpOverload):
            target = getattr(getattr(torch.ops.aten, name), node.target._overloadname)
        node.target = target


def _plain_module(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Our ungated convolution becomes torch.nn's, a foreign drop-path layer ours, a frozen gate a node."""
    module = graph_module.get_submodule(str(node.target))
    if is_random_drop(module) and not isinstance(module, StochasticDepth):
        if not hasattr(module, "drop_prob") and not isinstance(getattr(module, "p", None), (int, float)):
            return  # noise, say: it stays as it is
        p = float(getattr(module, "drop_prob", None) or getattr(module, "p", 0.0) or 0.0)
        mode = getattr(module, "mode", "row")
        ours = StochasticDepth(
            p, mode if mode in ("row", "batch") else "row", bool(getattr(module, "scale_by_keep", True))
        )
        if p == 0:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph_module.graph.erase_node(node)
        else:
            set_module(graph_module, str(node.target), ours.train(graph_module.training))
    elif isinstance(module, nn.Identity) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph_module.graph.erase_node(node)
    elif isinstance(module, FrozenConv2d):  # the product with its gate's decision follows
        set_module(graph_module, str(node.target), plain_conv(module))
    elif isinstance(module, Conv2d) and isinstance(module.gate, FrozenGate):
        _expand_frozen_conv(graph_module, node, module)


def _expand_frozen_conv(graph_module: fx.GraphModule, node: fx.Node, module: Conv2d) -> None:
    path = str(node.target)
    plain = plain_conv(module)
    plain.add_module("gate", module.gate)
    set_module(graph_module, path, plain)
    graph = graph_module.graph
    with graph.inserting_after(node):
        gate = graph.call_module(f"{path}.gate", (node,))
    with graph.inserting_after(gate):
        factor = graph.call_function(operator.getitem, (gate, (slice(None), slice(None), None, None)))
    with graph.inserting_after(factor):
        product = graph.call_function(torch.mul, (node, factor))
    value = node.meta["val"]
    gate.meta["val"], product.meta["val"] = value.new_empty(value.shape[:2]), value
    factor.meta["val"] = value.new_empty((*value.shape[:2], 1, 1))
    for new in (gate, factor, product):
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user not in (gate, product))


def plain_conv(module: nn.Conv2d) -> nn.Conv2d:
    """A ``torch.nn.Conv2d`` that shares the parameters of a convolution of any subclass."""
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
    return plain.train(module.training)


def bind_functional(node: fx.Node) -> dict[str, Any]:
    """Arguments of a functional conv2d, linear or norm node by their torch.nn.functional names."""
    names: Any = _FUNCTIONAL[op_name(node)]
    if isinstance(names, dict):
        names = names["aten" if isinstance(node.target, torch._ops.OpOverload) or node.target is torch.batch_norm
                      else "functional"]  # fmt: skip
    return {**_DEFAULTS, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _call_of_module(graph_module: fx.GraphModule, node: fx.Node, source: nn.Module) -> None:
    """Turn a functional layer on bare parameters into a call of the torch.nn module that owns them."""
    arguments = bind_functional(node)
    stored = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        origin = arguments.get(name)
        if origin is None:
            continue
        if not isinstance(origin, fx.Node) or origin.op != "get_attr":
            return
        stored[name] = str(origin.target)
    if not stored or arguments["training"] is True:
        return
    if op_name(node) == "batch_norm" and "running_mean" not in stored:
        return
    owners = {path.rpartition(".")[0] for path in stored.values()}
    tensors = {name: attribute(graph_module, path) for name, path in stored.items()}
    value = arguments["input"].meta.get("val")  # a frozen graph has no shapes yet; its norms are modules already
    module = _build(op_name(node), arguments, tensors, value.dim() if isinstance(value, Tensor) else 4)
    if module is None:
        return
    owner = owners.pop() if len(owners) == 1 else scope_of(node)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        path = stored["running_mean"].rpartition(".")[0]
        count = getattr(source.get_submodule(path), "num_batches_tracked", None)
        if isinstance(count, Tensor):
            module.num_batches_tracked = count
    path = _place(graph_module, owner, module)
    node.op, node.target = "call_module", path
    node.args, node.kwargs = (arguments["input"],), {}


def _build(name: str, arguments: dict[str, Any], tensors: dict[str, Tensor], dims: int) -> nn.Module | None:
    """The torch.nn module of a functional call on ``dims`` dimensions, holding the tensors; None if they do not fit."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    module: nn.Module
    if name in ("conv2d", "linear") and weight is not None:
        if not isinstance(weight, nn.Parameter) or not (bias is None or isinstance(bias, nn.Parameter)):
            return None
        if name == "linear":
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        else:
            groups, stride, padding, dilation = (arguments[k] for k in ("groups", "stride", "padding", "dilation"))
            if any(isinstance(v, fx.Node) for v in (groups, stride, padding, dilation)):
                return None
            module = nn.Conv2d(
                weight.shape[1] * groups, weight.shape[0], _pair(weight.shape[2:]), _pair(stride), _pair(padding),
                _pair(dilation), groups, bias=False, device="meta",
            )  # fmt: skip
    elif name == "batch_norm":
        mean = tensors["running_mean"]
        norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(dims, nn.BatchNorm2d)
        module = norm(mean.numel(), arguments["eps"], arguments["momentum"], weight is not None, device="meta")
        module.running_mean, module.running_var = mean, tensors["running_var"]
        module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    elif name == "layer_norm":
        module = nn.LayerNorm(tuple(arguments["normalized_shape"]), arguments["eps"], weight is not None, device="meta")
    else:
        if weight is None:
            return None
        module = nn.GroupNorm(int(arguments["num_groups"]), weight.numel(), arguments["eps"], device="meta")
    module.weight, module.bias = weight, bias  # type: ignore[assignment]
    return module


def _pair(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(value) if len(value) == 2 else (value[0], value[0])
    return value if isinstance(value, str) else (value, value)


def _place(graph_module: fx.GraphModule, owner: str, module: nn.Module) -> str:
    """Store the module at its owner's path, where that owner holds the same tensors and no others."""
    try:
        existing = graph_module.get_submodule(owner)
    except AttributeError:
        existing = nn.Module()
    if type(existing) is type(module) and all(
        getattr(existing, name) is getattr(module, name) for name in ("weight", "bias")
    ):
        return owner
    mine = {name for name, value in module.named_parameters(recurse=False)}
    theirs = {name for name, _ in existing.named_parameters(recurse=False)}
    same = (
        owner
        and theirs <= mine
        and all(getattr(existing, n) is getattr(module, n) for n in theirs if getattr(module, n) is not None)
    )
    path = owner if same else free_path(graph_module, f"{owner}.layer" if owner else "layer")
    if same:
        for name, child in existing.named_children():
            module.add_module(name, child)
    set_module(graph_module, path, module.train(graph_module.training))
    return path


def _dropout_module(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A functional dropout has its training flag written into the graph; a module asks itself."""
    names = ("input", "p", "training", "inplace")
    arguments = {"p": 0.5, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    source: Any = arguments["input"]
    p = arguments["p"]
    if not isinstance(p, (int, float)) or p == 0:
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
        return
    scope = scope_of(node)
    path = free_path(graph_module, f"{scope}.dropout" if scope else "dropout")
    set_module(graph_module, path, _DROPOUTS[op_name(node)](p).train(graph_module.training))
    node.op, node.target, node.args, node.kwargs = "call_module", path, (source,), {}
