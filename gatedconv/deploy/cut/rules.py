"""How each kind of node is written on fewer channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import op_name
from gatedconv.deploy.cut.emit import Emitter, Physical
from gatedconv.deploy.cut.layers import Dense, build_dense, constant_share, pad_with_ones, read_dense
from gatedconv.nn import AppendOnes, ChannelBias, ScatterAdd


def channelwise(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """An operation that keeps channels apart."""
    source = e.facts.source(node)
    return Physical(e.on_channels(node, source, e.lay_out(source, wanted), wanted), wanted)


def whole(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """An operation that is not understood: on everything, as it was."""
    return Physical(e.again(node, node.args, node.kwargs), torch.arange(e.flow[node].size))


def regroup(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """A pixel shuffle: r * r neighbouring channels become one."""
    source = e.facts.source(node)
    area = e.flow[source].size // e.flow[node].size
    read = (wanted[:, None] * area + torch.arange(area)).flatten()
    return Physical(e.on_first(node, source, e.lay_out(source, read)), wanted)


def move(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """Channels permuted, selected or moved to another dimension."""
    channels = e.flow[node]
    source, index = channels.source, channels.index
    assert source is not None and index is not None
    if channels.style == "same":
        return Physical(e.lay_out(source, wanted), wanted)
    if channels.style == "gather":
        return Physical(_pick(e, source, index[wanted]), wanted)
    if channels.style == "rerun":
        return Physical(e.on_first(node, source, e.lay_out(source, wanted)), wanted)
    repeat = channels.size // e.flow[source].size
    read = index[wanted].unique()
    shape = list(node.meta["val"].shape)
    shape[0], shape[channels.axis] = -1, len(read) * repeat
    value = e.lay_out(source, read)
    layout = (read[:, None] * repeat + torch.arange(repeat)).flatten()
    if len(shape) == 2:
        return Physical(e.graph.call_function(torch.flatten, (value, 1)), layout)
    e.is_sized = True
    return Physical(e.graph.call_function(torch.reshape, (value, tuple(shape))), layout)


def _pick(e: Emitter, source: fx.Node, index: Tensor) -> fx.Node:
    """Channels of the source in any order, all of them computed ones."""
    ordered = index.unique()
    value = e.lay_out(source, ordered)
    return (
        value
        if torch.equal(ordered, index)
        else e._gather(value, torch.searchsorted(ordered, index), e.flow[source].axis)
    )


def cat(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """A concatenation of what is left of its parts."""
    parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
    values, start = [], 0
    for part in parts:
        size = e.flow[part].size
        mine = wanted[(wanted >= start) & (wanted < start + size)] - start
        if mine.numel():
            values.append(e.lay_out(part, mine))
        start += size
    if len(values) == 1:
        return Physical(values[0], wanted)
    return Physical(e.graph.call_function(torch.cat, (values, e.flow[node].axis)), wanted)


def binary(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """Element-wise arithmetic, without the neutral half of it."""
    name = op_name(node)
    operands: Any = node.args
    left, right = operands[:2]
    if name == "add" and node.kwargs.get("alpha", 1) == 1 and (added := _scattered_sum(e, node, left, right, wanted)):
        return Physical(added, wanted)
    for one, other in ((left, right), (right, left)):
        neutral = {"mul": 1.0, "add": 0.0}.get(name)
        if neutral is not None and e.flow.has_channels(other) and _is_full(e, node, other):
            constant = _constant_operand(e, node, one, wanted)
            if constant is not None and bool((constant == neutral).all()):
                return Physical(e.lay_out(other, wanted), wanted)
    args = [_operand(e, node, o, wanted) for o in (left, right)]
    return Physical(e.graph.create_node(node.op, node.target, tuple(args), dict(node.kwargs)), wanted)


def _is_full(e: Emitter, node: fx.Node, operand: fx.Node) -> bool:
    """Whether the operand has the result's shape: the other one brings no dimension of its own."""
    return bool(operand.meta["val"].shape == node.meta["val"].shape)


def _constant_operand(e: Emitter, node: fx.Node, operand: Any, wanted: Tensor) -> Tensor | None:
    """The operand's value at the wanted channels if that is constant, shaped to broadcast."""
    if not e.flow.has_channels(operand) or e.flow[operand].size != e.flow[node].size:
        return None
    return e.facts.values(operand, wanted) if bool(e.facts.known(operand)[wanted].all()) else None


def _operand(e: Emitter, node: fx.Node, operand: Any, wanted: Tensor) -> Any:
    if not isinstance(operand, fx.Node):
        return operand
    size, axis = e.flow[node].size, e.flow[node].axis
    if e.flow.has_channels(operand):
        if e.flow[operand].size != size:
            return e.whole(operand)
        constant = _constant_operand(e, node, operand, wanted)
        if constant is None or constant.numel() != len(wanted):
            return e.lay_out(operand, wanted)
        return e.parameter(constant[0], f"{e.scope}.scale".lstrip("."))
    value = e.facts.constant(operand)
    mine = axis - (node.meta["val"].dim() - value.dim()) if isinstance(value, Tensor) else -1
    if mine < 0 or value.shape[mine] != size or len(wanted) == size:
        return e.whole(operand)
    cut = value.detach().index_select(mine, wanted)
    if isinstance(value, nn.Parameter):
        cut = nn.Parameter(cut, value.requires_grad)
    path = str(operand.target) if operand.op == "get_attr" else f"{e.scope}.constant".lstrip(".")
    return e.parameter(cut, path)


def _scattered_sum(e: Emitter, node: fx.Node, left: Any, right: Any, wanted: Tensor) -> fx.Node | None:
    """Stream + part where the part holds only some of the channels; None where a plain sum does."""
    if not (e.flow.has_channels(left) and e.flow.has_channels(right)):
        return None
    if left.meta["val"].shape != right.meta["val"].shape or not _is_full(e, node, left):
        return None
    held = [torch.isin(wanted, e.layout(o)) for o in (left, right)]
    if bool(held[0].all()) and bool(held[1].all()):
        return None
    stream, part = (left, right) if int(held[0].sum()) >= int(held[1].sum()) else (right, left)
    mine = held[1] if stream is left else held[0]
    missing = wanted[~mine]
    offset = e.facts.values(part, missing)
    axis = e.flow[node].axis
    if offset.numel() != len(missing):
        return None  # constants that differ from place to place: scattered into whole tensors
    result = e.lay_out(stream, wanted)
    if bool(mine.any()):
        index = mine.nonzero().flatten()
        result = e.call(ScatterAdd(index, axis), "scatter", result, e.lay_out(part, wanted[mine]))
    if bool((offset != 0).any()):
        full = torch.zeros(len(wanted), dtype=offset.dtype)
        full[~mine] = offset.flatten()
        if axis == 1 and node.meta["val"].dim() == 4:
            return e.call(ChannelBias(full), "bias", result)
        shape = [-1 if d == axis else 1 for d in range(1, node.meta["val"].dim())]
        bias = e.parameter(nn.Parameter(full.reshape(shape)), f"{e.scope}.bias".lstrip("."))
        return e.graph.call_function(torch.add, (result, bias))
    return result


def linear(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """A dense layer, or a 1x1 convolution of images whose channels come last."""
    source, layer = e.facts.source(node), read_dense(node, e.facts)
    read, value = _readable(e, source, layer)
    weight = layer.weight[wanted][:, read]
    bias = _bias(e, source, layer, wanted, read)
    return Physical(e.call_at(build_dense(layer, weight, bias), _path(node), value), wanted)


def conv(e: Emitter, node: fx.Node, wanted: Tensor) -> Physical:
    """A convolution without its closed outputs and constant inputs."""
    source, layer = e.facts.source(node), read_dense(node, e.facts)
    if layer.groups > 1:
        return _grouped(e, node, source, layer, wanted)
    read, value = _readable(e, source, layer)
    weight = layer.weight.detach()[wanted]
    absent = _absent(e, source, read)
    if absent.numel() and layer.is_padded:  # constants that fade at the border
        values = e.facts.values(source, absent).flatten()
        weight = pad_with_ones(weight[:, read], weight[:, absent], values)
        bias = None if layer.bias is None else layer.bias[wanted]
        value = e.call(AppendOnes(), "ones", value)
    else:
        bias = _bias(e, source, layer, wanted, read)
        weight = weight[:, read]
    return Physical(e.call_at(build_dense(layer, weight, bias), _path(node), value), wanted)


def _path(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    from gatedconv.convert.canonical import scope_of

    return scope_of(node) or "conv"


def _absent(e: Emitter, source: fx.Node, read: Tensor) -> Tensor:
    """Channels that the layer does not read although their constant is not 0."""
    mask = e.facts.known(source) & ~e.facts.zero(source)
    mask[read] = False
    return mask.nonzero().flatten()


def _readable(e: Emitter, source: fx.Node, layer: Dense) -> tuple[Tensor, fx.Node]:
    """The channels that the layer reads: those held; with them constants that differ from place to place."""
    read = e.layout(source)
    absent = _absent(e, source, read)
    if read.numel() == 0 or not bool(e.facts.uniform(source)[absent].all()):
        held = ~e.facts.known(source) | ~e.facts.zero(source)
        held[read] = True
        if not bool(held.any()):
            held[0] = True
        read = held.nonzero().flatten()
    return read, e.lay_out(source, read)


def _bias(e: Emitter, source: fx.Node, layer: Dense, wanted: Tensor, read: Tensor) -> Tensor | None:
    bias = None if layer.bias is None else layer.bias.detach()[wanted]
    absent = _absent(e, source, read)
    if absent.numel() == 0:
        return bias
    values = e.facts.values(source, absent).flatten()
    share = constant_share(layer.weight.detach()[wanted][:, absent], values.to(layer.weight.device))
    return share if bias is None else bias + share


def _grouped(e: Emitter, node: fx.Node, source: fx.Node, layer: Dense, wanted: Tensor) -> Physical:
    """Groups that are used, each with as many inputs and outputs as the fullest of them.

    A channel that fills a group up is a real one: its weights and its constant take part.
    """
    groups = layer.groups
    outs, ins = e.flow[node].size // groups, e.flow[source].size // groups
    live = (wanted // outs).unique()
    open_in = ~e.facts.known(source) | ~e.facts.zero(source)
    open_out = torch.zeros(e.flow[node].size, dtype=torch.bool)
    open_out[wanted] = True
    read = torch.cat([_fill(open_in, g, ins, live) for g in live])
    write = torch.cat([_fill(open_out, g, outs, live) for g in live])
    per_group_in, per_group_out = len(read) // len(live), len(write) // len(live)
    rows = layer.weight.detach()[write].reshape(len(live), per_group_out, *layer.weight.shape[1:])
    columns = (
        (read % ins).reshape(len(live), 1, per_group_in, 1, 1).expand(-1, per_group_out, -1, *layer.weight.shape[2:])
    )
    weight = rows.gather(2, columns.to(rows.device)).flatten(0, 1)
    bias = None if layer.bias is None else layer.bias.detach()[write]
    module = build_dense(layer, weight, bias, len(live))
    return Physical(e.call_at(module, _path(node), e.lay_out(source, read)), write)


def _fill(mask: Tensor, group: Tensor, size: int, live: Tensor) -> Tensor:
    """Members of a group: the marked ones and, in front of the others, as many as the fullest group has."""
    counts = mask.reshape(-1, size).sum(dim=1)
    most = max(1, int(counts[live].max()))
    mine = mask.reshape(-1, size)[group]
    order = torch.cat([mine.nonzero().flatten(), (~mine).nonzero().flatten()])[:most]
    return order.sort().values + group * size


RULES: dict[str, Callable[[Emitter, fx.Node, Tensor], Physical]] = {
    "channelwise": channelwise, "binary": binary, "cat": cat, "conv": conv, "linear": linear, "move": move,
    "regroup": regroup, "mix": whole, "opaque": whole,
}  # fmt: skip
