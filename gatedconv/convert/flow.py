"""How channels flow through a recorded run: which dimension they are in, and how each operation maps them.

Every value gets an axis, its channels' dimension, and a kind:

    input, constant           what the model was given; what no input can change
    elementwise               output channel c depends on channel c of the operands alone
    conv, linear              a convolution layer on NCHW; a linear layer on the last dimension
    cat                       concatenation of channels
    move                      channels permuted, selected, or moved to another dimension
    regroup                   pixel shuffle: r * r channels become one
    gate                      a gate's decision
    group_norm                a group norm: channels depend on those of their group alone
    mix                       a norm over channels: shape and axis stay, channels depend on each other
    deferred                  moved, but not (yet) to where the channels are one dimension
    opaque                    anything else: what is not proven is not touched
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gatedconv.convert.module_kinds import has_own_hooks, is_known_transposed
from gatedconv.convert.record import CALL, Node, Record, Value
from gatedconv.gating import Gate
from gatedconv.nn import GatherChannels

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
MIXING_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Mish,
    nn.Softplus,
    nn.Hardtanh,
    nn.LogSigmoid,
    nn.Softsign,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Tanhshrink,
    nn.Threshold,
    nn.RReLU,
)
PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)
SPATIAL = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.LPPool2d,
    nn.Upsample,
    nn.ZeroPad2d,
    nn.ConstantPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.CircularPad2d,
)
MOVING = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, GatherChannels)
ACTIVATION_OPS = frozenset(
    "relu silu gelu hardswish hardsigmoid sigmoid tanh leaky_relu elu selu celu mish softplus hardtanh "
    "log_sigmoid_forward".split()
)
ELEMENTWISE = ACTIVATION_OPS | frozenset(
    "clamp clamp_min clamp_max abs neg exp log log1p sqrt rsqrt pow reciprocal _to_copy clone sign sgn erf sin cos "
    "floor ceil round rsub add sub mul div maximum minimum eq ne gt lt ge le where masked_fill logical_and logical_or "
    "logical_not bitwise_and bitwise_or bitwise_not copy addcmul addcdiv lerp isnan threshold fill zeros_like "
    "ones_like square atan lift_fresh heaviside".split()
)
SPATIAL_OPS = frozenset(
    "max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
    "reflection_pad2d replication_pad2d mkldnn_max_pool2d".split()
)
REDUCTIONS = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "std": 1, "var": 1, "linalg_vector_norm": 2, "logsumexp": 1}
MOVES = frozenset(
    "view _unsafe_view reshape permute transpose t squeeze unsqueeze split unsafe_split split_with_sizes "
    "unsafe_split_with_sizes slice select unbind expand roll flip index_select index channel_shuffle "
    "native_channel_shuffle alias detach same narrow unfold_copy chunk unsafe_chunk".split()
)
MIXING_OPS = frozenset(
    "addmm mm bmm baddbmm matmul convolution _convolution einsum linear mkldnn_rnn_layer lstm gru "
    "_scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_native_multi_head_attention".split()
)


def op_name(node: Node) -> str:
    """The operation's name: ``relu`` for ``relu_``, too."""
    return node.op if node.op.startswith("_") else node.op.rstrip("_")


@dataclass(eq=False)
class Channels:
    """The channels of one value.

    Attributes:
        kind: see the module's docstring.
        axis: the channels' dimension; -1 where there is none.
        size: number of channels.
        source: of a move, the value whose channels these are; of an elementwise value, the operand that they follow.
        index: of a move, int64 (size,): the source's channel of each channel.
        ids: of a deferred value, where in ``source`` each of its elements is.
    """

    kind: str
    axis: int = -1
    size: int = 0
    source: Value | None = field(default=None, repr=False)
    index: Tensor | None = field(default=None, repr=False)
    ids: Any = field(default=None, repr=False)


class Flow:
    """The channels of every value of a record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.channels: dict[Value, Channels] = {}
        for node in record.nodes:
            for value in node.outputs:
                self.channels[value] = self._classify(node, value)

    def __getitem__(self, value: Value) -> Channels:
        found = self.channels.get(value)
        return found if found is not None else Channels("constant")

    def kind(self, value: Value) -> str:
        """The value's kind."""
        return self[value].kind

    def has_channels(self, value: Any) -> bool:
        """Whether the value has a channels' dimension and depends on the input."""
        return isinstance(value, Value) and self[value].axis >= 0

    def is_guess(self, value: Value) -> bool:
        """Whether an unsupported operation left the channel dimension unknown."""
        channels = self[value]
        while channels.kind in ("elementwise", "move") and channels.source is not None:
            channels = self[channels.source]
        return channels.kind == "opaque"

    def operands(self, node: Node) -> list[Value]:
        """The inputs of a node that have channels."""
        return [v for v in node.inputs if self.has_channels(v)]

    def source(self, node: Node) -> Value:
        """The first input that has channels."""
        return self.operands(node)[0]

    def is_uniform(self, node: Node) -> bool:
        """Whether the calls of a node's layer all have the same number of channels, in the same dimensions."""
        return len({self._shape(call) for call in self.record.same_layer(node)}) == 1

    def _shape(self, node: Node) -> tuple[tuple[str, int, int], ...]:
        read = (("", self[value].axis, self[value].size) for value in node.inputs)
        return (*read, *((self.kind(value), self[value].axis, self[value].size) for value in node.outputs))

    # -- one value -------------------------------------------------------------------------------------

    def _classify(self, node: Node, value: Value) -> Channels:
        if node.op == "input":
            return self._plain("input", value)
        if node.is_constant:
            return Channels("constant")
        if not _is_move(node):
            for source in node.inputs:
                # Moved channels met an operation that needs them in one dimension: its input begins a new set of them.
                if self.kind(source) == "deferred":
                    self.channels[source] = self._plain("opaque", source)
        if value.index and op_name(node) not in MOVES:
            return self._plain("opaque", value)
        found = self._module(node, value) if node.op == CALL else self._operation(node, value)
        return found or self._plain("opaque", value)

    def _plain(self, kind: str, value: Value, axis: int | None = None, source: Value | None = None) -> Channels:
        shape = value.tensor.shape
        if len(shape) < 2:
            return Channels("opaque" if kind != "gate" else kind)
        axis = axis if axis is not None else (len(shape) - 1 if len(shape) == 3 else 1)
        return Channels(kind, axis, int(shape[axis]), source)

    def _follow(self, kind: str, value: Value, source: Value, axis: int | None = None) -> Channels:
        return self._plain(kind, value, self[source].axis if axis is None else axis, source)

    def _module(self, node: Node, value: Value) -> Channels | None:
        module = node.module
        assert module is not None
        if isinstance(module, Gate):
            return self._plain("gate", value, 1)
        if has_own_hooks(module) or len(node.inputs) != 1 or len(node.outputs) != 1:
            return None
        source = node.inputs[0]
        if isinstance(module, MOVING) or (isinstance(module, PASSING) and self.kind(source) == "deferred"):
            return self._move(node, value)
        if not self.has_channels(source):
            return None
        axis, dims = self[source].axis, source.tensor.dim()
        image = axis == 1 and dims == 4
        if isinstance(module, nn.Conv2d) or is_known_transposed(module):
            return self._plain("conv", value, 1) if image and value.tensor.dim() == 4 else None
        if isinstance(module, nn.Linear):
            return self._plain("linear", value, dims - 1) if axis == dims - 1 else None
        if isinstance(module, nn.PixelShuffle) and image:
            return self._follow("regroup", value, source)
        if (
            isinstance(module, ACTIVATIONS + PASSING)
            or (isinstance(module, NORMS) and axis == 1)
            or (isinstance(module, nn.PReLU) and (axis == 1 or module.num_parameters == 1))
            or (isinstance(module, SPATIAL) and image)
        ):
            return self._follow("elementwise", value, source)
        if type(module) is nn.GroupNorm and module.num_groups > 1 and axis == 1:
            return self._follow("group_norm", value, source)
        return self._follow("mix", value, source) if isinstance(module, MIXING_NORMS) else None

    def _operation(self, node: Node, value: Value) -> Channels | None:
        name = op_name(node)
        if name == "cat":
            return self._cat(node, value)
        if name in MOVES:
            return self._move(node, value)
        if name in ELEMENTWISE:
            if name == "clone" and self.kind(node.inputs[0]) == "deferred":
                return self._move(node, value)
            return self._elementwise(node, value)
        if not node.args or not self.has_channels(node.args[0]):
            return None
        source = node.args[0]
        channels, dims = self[source], source.tensor.dim()
        image = channels.axis == 1 and dims == 4
        alone = len(self.operands(node)) == 1 and all(v is source or v.is_constant for v in node.inputs)
        if not alone:
            return None
        if "batch_norm" in name and channels.axis == 1:
            return self._follow("elementwise", value, source)
        if name in ("native_group_norm", "native_layer_norm", "_fused_rms_norm"):
            return self._follow("mix", value, source)
        if name == "pixel_shuffle" and image:
            return self._follow("regroup", value, source)
        if name in SPATIAL_OPS:
            return self._follow("elementwise", value, source) if image else None
        if name == "constant_pad_nd":
            first = dims - len(node.args[1]) // 2
            return self._follow("elementwise", value, source) if first > channels.axis else None
        if name in ("_softmax", "_log_softmax"):
            return self._follow("mix" if node.args[1] % dims == channels.axis else "elementwise", value, source)
        return self._reduction(node, value, name, source) if name in REDUCTIONS else None

    def _reduction(self, node: Node, value: Value, name: str, source: Value) -> Channels | None:
        axis, dims, position = self[source].axis, source.tensor.dim(), REDUCTIONS[name]
        dim = node.kwargs.get("dim", node.args[position] if len(node.args) > position else None)
        dim = [dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim
        if not isinstance(dim, (list, tuple)) or not dim:
            return None
        reduced = {d % dims for d in dim}
        if reduced & {0, axis}:
            keeps = 0 not in reduced and value.tensor.dim() == dims
            return self._follow("opaque", value, source) if keeps else None  # one channel, in the same dimension
        if value.tensor.dim() < dims:
            axis -= sum(d < axis for d in reduced)
        return self._follow("elementwise", value, source, axis)

    def _cat(self, node: Node, value: Value) -> Channels | None:
        parts = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not all(map(self.has_channels, parts)):
            return None
        axis = self[parts[0]].axis
        if dim % value.tensor.dim() != axis or any(self[p].axis != axis for p in parts):
            return None
        return self._plain("cat", value, axis)

    def _elementwise(self, node: Node, value: Value) -> Channels | None:
        """Operands line up from the right, as in broadcasting; at least one has the result's channels."""
        dims, axis, leader = value.tensor.dim(), None, None
        for operand in node.inputs:
            if operand.is_constant:
                continue
            if not self.has_channels(operand) or operand.tensor.dim() != dims:
                return None
            found = self[operand]
            if found.size != value.tensor.shape[found.axis]:
                if found.size != 1:
                    return None
                continue
            if found.size == 1 and axis is not None:
                continue
            if axis is not None and axis != found.axis:
                return None
            axis, leader = found.axis, operand
        if axis is None or any(self[o].axis != axis for o in self.operands(node)):
            return None
        return self._plain("elementwise", value, axis, leader)

    # -- moves -----------------------------------------------------------------------------------------

    def _move(self, node: Node, value: Value) -> Channels | None:
        parent = node.inputs[0]
        channels = self[parent]
        if any(not v.is_constant for v in node.inputs[1:]):
            return None
        if channels.kind == "deferred":
            source, ids = channels.source, channels.ids
        elif self.has_channels(parent):
            source, ids = parent, torch.arange(parent.tensor.numel(), device="cpu").reshape(parent.tensor.shape)
        else:
            return None
        assert source is not None
        moved = self._run(node, ids)
        moved = moved[value.index] if isinstance(moved, (list, tuple)) else moved
        if not isinstance(moved, Tensor) or moved.shape != value.tensor.shape:
            return None
        return self._resolve(source, moved) or Channels("deferred", source=source, ids=moved)

    @torch.no_grad()
    def _run(self, node: Node, first: Tensor) -> Any:
        """The node on the numbers of its input's elements."""
        if node.op == "same":
            return first
        if node.module is not None:
            return type(node.module).forward(node.module, first)
        swap = node.inputs[0]

        def concrete(item: Any) -> Any:
            if item is swap:
                return first
            return item.tensor.cpu() if isinstance(item, Value) else item

        args, kwargs = tree_map(concrete, (node.args, node.kwargs), is_leaf=lambda i: isinstance(i, Value))
        return node.func(*args, **kwargs)

    def _resolve(self, source: Value, moved: Tensor) -> Channels | None:
        """Find the channels of ``source`` in a tensor that holds the numbers of its elements."""
        shape, axis = source.tensor.shape, self[source].axis
        size = int(shape[axis])
        if moved.dim() < 2 or moved.numel() == 0 or moved.shape[0] != shape[0]:
            return None
        batch = moved // math.prod(shape[1:])
        if not bool((batch == torch.arange(shape[0], device="cpu").reshape(-1, *[1] * (moved.dim() - 1))).all()):
            return None
        channel = (moved // math.prod(shape[axis + 1 :])) % size
        axes = sorted(range(1, moved.dim()), key=lambda a: (a != axis, a))
        axes = [a for a in axes if size > 1 or moved.shape[a] == 1]
        found = next((a for a in axes if _only_along(channel, a)), None)
        if found is None:
            return None
        index = channel.movedim(found, 0).reshape(moved.shape[found], -1)[:, 0].clone()
        return Channels("move", found, len(index), source, index)


def _is_move(node: Node) -> bool:
    if node.op == CALL:
        return isinstance(node.module, MOVING + PASSING)
    return op_name(node) in MOVES or op_name(node) == "clone"


def _only_along(channel: Tensor, axis: int) -> bool:
    rows = channel.movedim(axis, 0).reshape(channel.shape[axis], -1)
    return bool((rows == rows[:, :1]).all())


def is_mixing(node: Node) -> bool:
    """Whether the node is a layer whose outputs each depend on all channels: later values have no separate channels."""
    module = node.module
    if isinstance(module, nn.modules.conv._ConvNd):
        return not (module.groups > 1 and module.groups == module.in_channels)
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        return True
    if op_name(node) == "convolution":
        groups, source = node.args[8], node.inputs[0]
        return not (groups > 1 and groups == source.tensor.shape[1])
    return op_name(node) in MIXING_OPS
