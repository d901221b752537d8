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
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from gatedconv import nn as gated_nn
from gatedconv.convert.flow import ELEMENTWISE, MIXING_OPS, MOVES, REDUCTIONS, SPATIAL_OPS
from gatedconv.gating import ChannelGate, FrozenGate, Gate, LayerGate
from gatedconv.gating.gates import LearnedGate
from gatedconv.nn import FrozenConv2d, GraphNet

_PATH = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)  # torch.fx quotes what is no identifier
# Our modules: constructor arguments that are tensors of the state, and those that are plain attributes.
_OWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ChannelBias": (("bias",), ()),
    "ConstantMap": (("value",), ("stride",)),
    "EmptyMap": ((), ("channels", "kernel_size", "stride", "padding", "dilation")),
    "GatherChannels": (("index",), ("axis", "size")),
    "ScatterAdd": (("index",), ("axis",)),
    "ScatterChannels": (("index", "fill"), ("axis",)),
    "Zeros": ((), ()),
}


_LAYERS = frozenset(
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AvgPool1d AvgPool2d "
    "AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ChannelShuffle CircularPad2d ConstantPad2d Conv1d "
    "Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineSimilarity Dropout Dropout1d Dropout2d "
    "Dropout3d AlphaDropout FeatureAlphaDropout ELU Embedding Flatten Fold GELU GLU GroupNorm GRU Hardshrink "
    "Hardsigmoid Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm LeakyReLU Linear "
    "LocalResponseNorm LogSigmoid LogSoftmax LPPool1d LPPool2d LSTM MaxPool1d MaxPool2d MaxPool3d Mish PixelShuffle "
    "PixelUnshuffle PReLU ReflectionPad1d ReflectionPad2d ReLU ReLU6 ReplicationPad1d ReplicationPad2d RMSNorm RNN "
    "RReLU SELU Sigmoid SiLU Softmax Softmax2d Softmin Softplus Softshrink Softsign SyncBatchNorm Tanh Tanhshrink "
    "Threshold Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad2d".split()
)
# The only strings that are arguments of a layer or a function.
_STRINGS = frozenset(
    "zeros reflect replicate circular same valid nearest nearest-exact linear bilinear bicubic trilinear area none "
    "tanh floor trunc ste gumbel bernoulli batch_mean avg flatten row batch RNN_TANH RNN_RELU relu mean sum max".split()
)
_LARGEST = 1 << 16  # a number in a description, unless a tensor of the file is larger


def is_describable(module: nn.Module) -> bool:
    """Whether a file can describe the module: torch.nn's layers, gates, and our small modules."""
    if isinstance(module, Gate):
        return isinstance(module, (FrozenGate, LearnedGate))
    name = type(module).__name__
    if type(module) is FrozenConv2d or (name in _OWN and type(module) is getattr(gated_nn, name)):
        return True
    return name in _LAYERS and type(module) is getattr(nn, name)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, creating the containers on the way."""
    *parents, name = path.split(".")
    for part in parents:
        if not isinstance(getattr(root, part, None), nn.Module):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    for child_name, child in root._modules.get(name, nn.Module()).named_children():  # type: ignore[union-attr]
        module.add_module(child_name, child)
    root.add_module(name, module)


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
            modules[path] = describe_module(path, module)
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
    require_small({key: description[key] for key in ("modules", "nodes")}, state)
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
    for path, spec in sorted(description["modules"].items(), key=lambda item: item[0].count(".")):
        set_module(root, path, build_module(path, spec, state))
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs in description["nodes"]:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is no name of a node")
        decoded_args, decoded_kwargs = _decode(args, values), _decode(kwargs, values)
        found = _target(op, target)
        values[name] = graph.create_node(op, found, tuple(decoded_args), decoded_kwargs, name)
    class_name = str(description["name"])
    return GraphNet(root, graph, class_name if class_name.isidentifier() else "GraphNet")


def require_small(description: Any, state: Mapping[str, Tensor], most: int = _LARGEST) -> None:
    """Raise ValueError for a whole number above ``most`` that is larger than every tensor of the file."""
    largest = max([most, *(t.numel() for t in state.values())])

    def look(item: Any) -> None:
        if isinstance(item, int) and abs(item) > largest and abs(item) < 2**63 - 1:  # the end of a slice
            raise ValueError(f"the number {item} is larger than every tensor of the file")
        for part in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            look(part)

    look(description)


# -- modules -------------------------------------------------------------------------------------------


def describe_module(path: str, module: nn.Module) -> list[Any]:
    """Class, constructor arguments and names of frozen parameters, as JSON types; TypeError for any other module."""
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
    if isinstance(module, nn.RNNBase):
        names = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size".split()
        names += ["nonlinearity"] if isinstance(module, nn.RNN) else []
        return {name: getattr(module, name) for name in names if name != "proj_size" or isinstance(module, nn.LSTM)}
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
        "in_channels": gate.in_channels,
        "hidden": hidden,
        "estimator": gate.estimator.name,
        "temperature": gate.estimator.temperature,
    }
    if isinstance(gate, ChannelGate):
        arguments |= {"num_gates": gate.num_gates, "pool": gate.pool, "feature_size": gate.feature_size}
    return arguments | ({"calls": gate.calls} if gate.calls > 1 else {})


def build_module(path: str, spec: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """The layer of a description, on the meta device but for tensors that it is made from."""
    require_small(spec, state)
    kind, arguments, frozen = spec
    with torch.device("meta"):  # the file's tensors come in their place: nothing is allocated that it only names
        module = _build_module(_checked_path(path), kind, _decode(arguments, {}), state)
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    return module


def _build_module(path: str, kind: str, arguments: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    if kind.startswith("torch.nn."):
        if kind.removeprefix("torch.nn.") not in _LAYERS:
            raise ValueError(f"a file builds no layer {kind!r}")
        layer: nn.Module = getattr(nn, kind.removeprefix("torch.nn."))(**arguments)
        return layer
    if kind == "FrozenConv2d":
        return FrozenConv2d(nn.Conv2d(**arguments), torch.empty_like(state[f"{path}.out_open"]))
    if kind == "FrozenGate":
        return FrozenGate(torch.ones_like(state[f"{path}.mask"]))
    if kind in ("LayerGate", "ChannelGate"):
        calls = int(arguments.pop("calls", 1))
        gate = (LayerGate if kind == "LayerGate" else ChannelGate)(**arguments)
        gate.calls = calls
        return gate
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

_OPERATORS = {
    "operator.getitem": operator.getitem,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
}
# The ATen operations that a graph may call: they compute, and touch neither files nor the process.
_ATEN = (
    ELEMENTWISE
    | SPATIAL_OPS
    | MOVES
    | MIXING_OPS
    | frozenset(REDUCTIONS)
    | frozenset(
        "cat stack constant_pad_nd reflection_pad1d replication_pad1d circular_pad native_batch_norm "
        "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update native_group_norm "
        "native_layer_norm _fused_rms_norm _softmax _log_softmax pixel_shuffle pixel_unshuffle _weight_norm_interface "
        "_weight_norm var_mean std_mean cumsum topk sort argmax argmin max min any all gather scatter index_put prod "
        "grid_sampler_2d im2col col2im view_as_real view_as_complex _fft_r2c _fft_c2r _fft_c2c real imag complex conj "
        "_conj resolve_conj polar dot mv addmv outer linalg_vector_norm upsample_linear1d upsample_nearest1d "
        "upsample_trilinear3d upsample_nearest3d avg_pool1d avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d "
        "convolution_overrideable slow_conv2d_forward mkldnn_convolution tril triu one_hot eye full_like new_zeros "
        "new_ones new_full repeat repeat_interleave scalar_tensor item _unsafe_index isfinite isinf remainder fmod "
        "trunc frac atan2 hypot sinh cosh asin acos tan log2 log10 exp2 expm1 erfc erfinv cross cdist _cdist_forward "
        "nonzero fmax fmin logical_xor scatter_add index_add masked_select mish glu prelu _prelu_kernel "
        "rrelu_with_noise slice_scatter select_scatter".split()
    )
)
_OURS = ("gatedconv.gated_scale.default", "gatedconv.masked_conv2d.default")
_TORCHVISION = ("torchvision.nms.default", "torchvision.roi_align.default", "torchvision.deform_conv2d.default")


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    name = next((n for n, f in _OPERATORS.items() if f is node.target), str(node.target))
    _function(name, lambda why: TypeError(f"save: a file cannot describe node {node.name}: {why}"))
    return name


def _function(name: str, error: Callable[[str], Exception] = ValueError) -> Any:
    if name in _OPERATORS:
        return _OPERATORS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if not (namespace == "aten" and packet in _ATEN) and name not in (*_OURS, *_TORCHVISION):
        raise error(f"unknown function {name!r}")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise error(f"unknown function {name!r}")
    return found


def _target(op: str, target: str) -> Any:
    if op == "call_function":
        return _function(target)
    if op == "call_method":
        if target != "size":
            raise ValueError(f"a graph calls no method {target!r}")
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
    if isinstance(value, str) and value not in _STRINGS:
        raise ValueError(f"a description has no string {value[:40]!r}")
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
