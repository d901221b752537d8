"""A graph network as JSON and back: constructors' arguments, nodes, and nothing that can run by itself.

The graph's own source text is generated from the description on loading, so every name that ends up in it
is checked against what the package could have written.
"""

from __future__ import annotations

import inspect
import keyword
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from gatedconv import nn as gated_nn
from gatedconv.convert.canonical import set_module
from gatedconv.gating import ChannelGate, FrozenGate, Gate, LayerGate
from gatedconv.gating.gate import LearnedGate
from gatedconv.nn import FrozenConv2d, GraphNet

_OPERATORS = ("add sub mul truediv floordiv mod pow neg getitem eq ne lt le gt ge and_ or_ not_ is_ is_not iadd isub "
              "imul matmul").split()  # fmt: skip
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)  # torch.fx quotes what is no identifier
# Our modules: constructor arguments that are tensors of the state, and those that are plain attributes.
_OWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AddBranch": ((), ()), "AppendOnes": ((), ()), "ChannelBias": (("bias",), ()), "Constant": (("value",), ()),
    "ConstantMap": (("value",), ("stride",)), "GatherChannels": (("index",), ("axis",)),
    "ScatterAdd": (("index",), ("axis",)), "ScatterChannels": (("index", "fill"), ("axis",)),
    "SelectOpen": ((), ("at_least",)), "StochasticDepth": ((), ("p", "mode", "scale")),
}  # fmt: skip


def describe_graph(model: GraphNet) -> dict[str, Any]:
    """JSON types that ``build_graph`` turns into the same network, given its state dict.

    Raises:
        TypeError: a module or function that is neither torch's nor ours.
    """
    modules, tensors = {}, {}
    for path, module in model.named_modules():
        if path == "" or any(isinstance(m, Gate) for m in _parents(model, path)):
            continue
        if type(module) is nn.Module:
            for name, parameter in module.named_parameters(recurse=False):
                tensors[f"{path}.{name}"] = ["parameter", parameter.requires_grad]
            for name, _ in module.named_buffers(recurse=False):
                tensors[f"{path}.{name}"] = ["buffer", False]
        else:
            modules[path] = _describe_module(path, module)
    for name, parameter in model.named_parameters(recurse=False):
        tensors[name] = ["parameter", parameter.requires_grad]
    for name, _ in model.named_buffers(recurse=False):
        tensors[name] = ["buffer", False]
    nodes = [
        [node.name, node.op, _target_name(node), _encode(node.args), _encode(dict(node.kwargs))]
        for node in model.graph.nodes
    ]
    return {"name": type(model).__name__, "modules": modules, "tensors": tensors, "nodes": nodes}


def build_graph(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> GraphNet:
    """The network of a description, its weights not yet loaded.

    Raises:
        ValueError, KeyError, TypeError: a description that this version could not have written.
    """
    root = nn.Module()
    for path, (kind, requires_grad) in description["tensors"].items():
        owner, _, name = _checked_path(path).rpartition(".")
        if owner and not _has_module(root, owner):
            set_module(root, owner, nn.Module())
        holder, value = root.get_submodule(owner), torch.empty_like(state[path])
        if kind == "parameter":
            holder.register_parameter(name, nn.Parameter(value, requires_grad))
        else:
            holder.register_buffer(name, value)
    for path, (kind, arguments, frozen) in sorted(description["modules"].items(), key=lambda item: item[0].count(".")):
        module = _build_module(_checked_path(path), kind, _decode(arguments, {}), state)
        for name in frozen:
            getattr(module, name).requires_grad_(False)
        set_module(root, path, module)
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs in description["nodes"]:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is no name of a node")
        decoded_args, decoded_kwargs = _decode(args, values), _decode(kwargs, values)
        found = _target(op, target, decoded_args)
        values[name] = graph.create_node(op, found, tuple(decoded_args), decoded_kwargs, name)
    class_name = str(description["name"])
    return GraphNet(root, graph, class_name if class_name.isidentifier() else "GraphNet")


# -- modules -------------------------------------------------------------------------------------------


def _describe_module(path: str, module: nn.Module) -> list[Any]:
    name = type(module).__name__
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    if isinstance(module, Gate):
        return [name, _encode(_gate_arguments(module)), frozen]
    if type(module) is FrozenConv2d:
        return [name, _encode(_torch_arguments(module, nn.Conv2d)), frozen]
    if name in _OWN and type(module) is getattr(gated_nn, name):
        return [name, _encode({a: getattr(module, a) for a in _OWN[name][1]}), frozen]
    if parametrize.is_parametrized(module):
        raise TypeError(
            f"save: the weights of {path} are computed by parametrizations, which "
            f"a file cannot describe; compact makes plain weights of them, as does remove_parametrizations"
        )
    if getattr(nn, name, None) is not type(module):
        raise TypeError(f"save: {path} is a {type(module).__module__}.{name}, which a file cannot describe")
    frozen = [n for n, p in module.named_parameters(recurse=False) if not p.requires_grad]
    return [f"torch.nn.{name}", _encode(_torch_arguments(module)), frozen]


def _torch_arguments(module: nn.Module, cls: type[nn.Module] | None = None) -> dict[str, Any]:
    """Constructor arguments, which torch.nn keeps under their names."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature((cls or type(module)).__init__).parameters.items():
        if name in ("self", "device", "dtype", "_weight", "_bias", "_freeze"):
            continue
        if name == "bias" and not isinstance(getattr(module, "bias", None), bool):
            arguments[name] = getattr(module, "bias", None) is not None
        elif hasattr(module, name):
            arguments[name] = getattr(module, name)
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError(f"save: the argument {name} of {type(module).__name__} is not known")
    return arguments


def _gate_arguments(gate: Gate) -> dict[str, Any]:
    if isinstance(gate, FrozenGate):
        return {}
    if not isinstance(gate, LearnedGate):
        raise TypeError(f"save: a {type(gate).__name__} is no gate of gatedconv")
    hidden = gate.fc1.out_features if gate.fc1 is not None else None
    arguments = {
        "in_channels": gate.in_channels, "hidden": hidden, "estimator": gate.estimator.name,
        "temperature": gate.estimator.temperature,
    }  # fmt: skip
    if isinstance(gate, ChannelGate):
        arguments |= {"num_gates": gate.num_gates, "pool": gate.pool, "feature_size": gate.feature_size}
    return arguments


def _build_module(path: str, kind: str, arguments: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    if kind.startswith("torch.nn."):
        cls = getattr(nn, kind.removeprefix("torch.nn."), None)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ValueError(f"torch.nn has no layer {kind!r}")
        return cls(**arguments)
    if kind == "FrozenConv2d":
        return FrozenConv2d(nn.Conv2d(**arguments), torch.empty_like(state[f"{path}.out_open"]))
    if kind == "FrozenGate":
        return FrozenGate(torch.ones_like(state[f"{path}.mask"]))
    if kind in ("LayerGate", "ChannelGate"):
        gate: Callable[..., nn.Module] = LayerGate if kind == "LayerGate" else ChannelGate
        return gate(**arguments)
    if kind not in _OWN:
        raise ValueError(f"unknown layer {kind!r}")
    tensors = {name: torch.empty_like(state[f"{path}.{name}"]) for name in _OWN[kind][0]}
    built: nn.Module = getattr(gated_nn, kind)(**tensors, **arguments)
    return built


def _parents(model: nn.Module, path: str) -> list[nn.Module]:
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:n])) for n in range(1, len(parts))]


def _has_module(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _checked_path(path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is no path of a layer")
    return path


# -- functions -----------------------------------------------------------------------------------------


@cache
def _functions() -> dict[str, Any]:
    """Every function that a graph may call, by name."""
    known: dict[str, Any] = {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    known["getattr"] = getattr
    for name in dir(torch._C._VariableFunctions):
        if not name.startswith("_") and name != "from_file" and callable(getattr(torch, name, None)):
            known[f"torch.{name}"] = getattr(torch, name)
    for name in dir(F):
        value = getattr(F, name)
        if not name.startswith("_") and callable(value) and not inspect.isclass(value):
            if getattr(value, "__module__", "") in (
                "torch.nn.functional",
                "torch._C._nn",
                "torch._jit_internal",
                None,
            ):
                known[f"torch.nn.functional.{name}"] = value
    return known


@cache
def _function_names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(list(_functions().items()))}


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return str(node.target)
    name = _function_names().get(id(node.target))
    if name is None:
        raise TypeError(f"save: a file cannot describe the function {node.target!r} of node {node.name}")
    return name


def _target(op: str, target: str, args: Any) -> Any:
    if op == "call_function":
        if target.startswith("aten."):
            _, packet, overload = target.split(".")
            return getattr(getattr(torch.ops.aten, packet), overload)
        function = _functions().get(target)
        if function is None:
            raise ValueError(f"unknown function {target!r}")
        if function is getattr and args[1] not in _ATTRIBUTES:
            raise ValueError(f"a graph reads no attribute {args[1]!r}")
        return function
    if op == "call_method":
        if target.startswith("_") or not callable(getattr(Tensor, target, None)):
            raise ValueError(f"tensors have no method {target!r}")
        return target
    if op in ("call_module", "get_attr"):
        return _checked_path(target)
    if op not in ("placeholder", "output") or not target.isidentifier():
        raise ValueError(f"unknown node {op!r} {target!r}")
    return target


# -- values --------------------------------------------------------------------------------------------


def _encode(value: Any) -> Any:
    """JSON types; what JSON lacks is an object with one key."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {key: _encode(v) for key, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise TypeError(f"save: a file cannot describe {value!r}")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(v, nodes) for v in content)
    if kind == "dict":
        return {str(key): _decode(v, nodes) for key, v in content.items()}
    if kind == "slice":
        return slice(*(_decode(v, nodes) for v in content))
    if kind == "ellipsis":
        return ...
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content) if kind == "torch" else None
    if not isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
        raise ValueError(f"unknown value {value!r}")
    return found
