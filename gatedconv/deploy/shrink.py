"""Smaller layers in a model's own places, and the small modules around those whose channels its code still expects.

Which channels are left of each tensor, of sums and concatenations too, is in the ``Removal`` of
``convert.channels``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from gatedconv.convert.channels import Removal
from gatedconv.convert.install import device_of
from gatedconv.convert.module_kinds import CONVS, groups_of, is_depthwise, is_exact, weight_of
from gatedconv.convert.record import CALL, ModuleCall, Node, Value
from gatedconv.convert.verify import TOLERANCES, as_inputs, distance, run_seeded, trains
from gatedconv.deploy.slicing import set_weight, slice_numbers
from gatedconv.nn import EmptyMap, Framed, GatherChannels, ScatterChannels, Zeros
from gatedconv.nn.modules import take_place

SLICE_ERROR = TOLERANCES[torch.float32]  # `distance` of a user's module with fewer channels from the module


class CannotSlice(Exception):
    """A module of the user's own code computes something else on fewer channels."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@torch.no_grad()
def shrink(model: nn.Module, removal: Removal) -> None:
    """Make a model smaller, in place; it has the module paths of the recorded one.

    Raises:
        CannotSlice: a trial failed.
    """
    flow = removal.flow
    nodes = [node for node in flow.record.nodes if flow.record.same_layer(node)[0] is node]  # once for all its calls
    for node in nodes:
        for value in node.outputs:
            if flow.kind(value) in ("conv", "linear"):
                _layer(model, removal, node, value)
    for path, call in removal.sliced.items():
        _foreign(model, removal, path, call)
    inside = tuple(f"{path}." for path in removal.sliced)
    for node in nodes:
        if node.scope.startswith(inside):
            continue
        if removal.is_idle(node):
            _replace(model, node.scope, nn.Identity())
        elif node.op == CALL and node.outputs and flow.kind(node.outputs[0]) in ("elementwise", "group_norm"):
            _numbers(model, removal, node, node.outputs[0])
    first: dict[str, Value] = {}  # of the values of several calls
    for value, path in removal.masks.paths.items():
        first.setdefault(path, value)
    for value in first.values():
        if flow.kind(value) not in ("conv", "linear"):
            _behind(model, removal, value)
    for node, value in removal.masks.inputs:
        if flow.kind(node.outputs[0]) not in ("conv", "linear") or not removal.is_sliceable(node):
            mask = removal.masks.inputs[node, value]
            every, zeros = ~removal.zeros(value), torch.zeros(len(mask), device="cpu")
            _frame(model, node.scope, _glue(every, every, ~mask, zeros, value, flow[value].axis), [])


# -- single modules ------------------------------------------------------------------------------------


def _layer(model: nn.Module, removal: Removal, node: Node, value: Value) -> None:
    module = model.get_submodule(node.scope)
    source, axis = node.inputs[0], removal.flow[value].axis
    held, kept = removal.present[source], removal.present[value]
    computed = removal.computed(node, value)
    read = held
    if not removal.is_sliceable(node):
        if removal.is_dead(node):
            read, module = computed.new_zeros(len(held)), _nothing(module)
    else:
        read, _ = removal.layer_channels(node, value)
        if bool(read.all()) and bool(computed.all()):
            pass
        elif is_exact(module, *CONVS, nn.Linear):
            module = _small_layer(removal, node, module, read, computed)
        else:
            module = _foreign_layer(removal, node, module, read, computed)
    before = _gather(read, held, source, removal.flow[source].axis) if not torch.equal(read, held) else []
    closed = removal.known[value]
    if value not in removal.masks.values and (node, source) not in removal.masks.inputs:
        closed = removal.zeros(value)  # what is computed is right
    after = _glue(computed, kept, closed, removal.constant[value], value, axis)
    if isinstance(module, EmptyMap) and not bool(removal.constant[value].any()):
        module.channels, before, after = int(kept.sum()), [], []
    model.set_submodule(node.scope, module)
    _frame(model, node.scope, before, after)


def _small_layer(removal: Removal, node: Node, module: nn.Module, read: Tensor, write: Tensor) -> nn.Module:
    """The layer with the inputs ``read`` and outputs ``write``; its bias includes the constants that are not read."""
    if not bool(write.any()):
        return _nothing(module)
    assert isinstance(module, (*CONVS, nn.Linear))
    weight, groups = weight_of(module), groups_of(module)
    rows = weight[write.to(weight.device)]
    device = weight.device
    if is_depthwise(module):
        small, bias, groups = rows, None, int(read.sum())
    elif groups == 1:
        absent = ~read
        known, constant = removal.known_to_layer(node)
        values = torch.where(absent & known, constant, 0.0).to(device)
        summed = rows.flatten(2).sum(dim=2) if rows.dim() > 2 else rows
        share = summed.double() @ values.double()
        bias = share.to(weight.dtype) if bool((share != 0).any()) else None
        small = rows[:, read.to(device)]
    else:
        live = read.reshape(groups, -1).any(dim=1)
        per_in, per_out = read.reshape(groups, -1)[live], write.reshape(groups, -1)[live]
        # A closed channel may fill up its group. What its gate would have multiplied by 0, its weights do.
        is_open = removal.masks.inputs.get((node, node.inputs[0]), read).reshape(groups, -1)[live]
        parts = []
        for group, (ins, outs) in enumerate(zip(per_in, per_out, strict=True)):
            block = rows[group * int(outs.sum()) : (group + 1) * int(outs.sum())]
            zeros = (~is_open[group][ins]).to(device)
            parts.append(block[:, ins.to(device)].masked_fill(zeros.reshape(1, -1, 1, 1), 0.0))
        small, bias, groups = torch.cat(parts), _group_bias(removal, node, rows, read, write, groups), int(live.sum())
    old = None if module.bias is None else module.bias[write.to(device)]
    if old is not None or bias is not None:
        total = old if bias is None else bias if old is None else old + bias
        learns = module.weight.requires_grad if module.bias is None else module.bias.requires_grad
        assert total is not None
        module.bias = nn.Parameter(total.clone(), learns)
    set_weight(module, small, groups)
    return module


def _group_bias(removal: Removal, node: Node, rows: Tensor, read: Tensor, write: Tensor, groups: int) -> Tensor | None:
    known, constant = removal.known_to_layer(node)
    values = torch.where(~read & known, constant, 0.0).reshape(groups, -1).to(rows.device, torch.float64)
    group = (
        torch.arange(len(write), device="cpu").reshape(groups, -1)[:, :1].expand(groups, len(write) // groups).flatten()
    )
    group = (group // (len(write) // groups))[write].to(rows.device)
    share = (rows.flatten(2).sum(dim=2).double() * values[group]).sum(dim=1)
    return share.to(rows.dtype) if bool((share != 0).any()) else None


def _nothing(module: nn.Module) -> nn.Module:
    """What is left of a layer whose outputs are not needed, with the attributes that the user gave it."""
    empty = _empty(module)
    take_place(empty, module, hooks=False)
    return empty


def _empty(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Conv2d):
        device = next(module.parameters()).device
        return GatherChannels(torch.zeros(0, dtype=torch.long, device=device), -1)
    padding = module.padding
    if isinstance(padding, str):
        if padding == "same":  # the map's own size; of an even kernel the sides differ
            return EmptyMap(0, (1, 1), (1, 1), (0, 0), (1, 1))
        padding = (0, 0)
    return EmptyMap(0, module.kernel_size, module.stride, tuple(padding), module.dilation)  # type: ignore[arg-type]


def _foreign_layer(removal: Removal, node: Node, module: nn.Module, read: Tensor, write: Tensor) -> nn.Module:
    """A layer of a subclass with code of its own: sliced like a plain one, if a trial finds that right."""
    known, constant = removal.known_to_layer(node)
    unread = ~read & known & (constant != 0) & (not is_depthwise(module))
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    if bool(unread.any()) or not bool(write.any()):
        raise CannotSlice(node.scope)
    small = copy.deepcopy(module)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.shape == module.weight.shape:  # a mask of the weight
            part = buffer[write.to(buffer.device)]
            small._buffers[name] = part if is_depthwise(module) else part[:, read.to(buffer.device)]
    for name, parameter in module._parameters.items():
        if parameter is None or name == "weight":
            continue
        if parameter.dim() and parameter.shape[0] == len(write):
            small._parameters[name] = nn.Parameter(
                parameter[write.to(parameter.device)].clone(), parameter.requires_grad
            )
    weight = module.weight[write.to(module.weight.device)]
    weight = weight if is_depthwise(module) else weight[:, read.to(weight.device)]
    set_weight(small, weight, int(read.sum()) if is_depthwise(module) else 1)
    _require_slice(removal, node.scope, module, small, node.inputs[0], read, write, removal.flow[node.outputs[0]].axis)
    return small


def _foreign(model: nn.Module, removal: Removal, path: str, call: ModuleCall) -> None:
    source, value = call.inputs[0], call.outputs[0]
    held = removal.present[source]
    if bool(held.all()):
        return
    module = model.get_submodule(path)
    idle = value in removal.masks.values  # else a reader further on may want its constants
    if idle and not bool(removal.wanted(value).any()) and value.tensor.shape == source.tensor.shape:
        _replace(model, path, nn.Identity())
        return
    small = copy.deepcopy(module)
    for part in small.modules():
        slice_numbers(part, held)
    _require_slice(removal, path, module, small, source, held, held, removal.flow[value].axis)
    model.set_submodule(path, small)


def _numbers(model: nn.Module, removal: Removal, node: Node, value: Value) -> None:
    """Slice the parameters and buffers of a norm or PReLU that have a number for each channel."""
    module = model.get_submodule(node.scope)
    computed = removal.computed(node, value)
    if not bool(computed.all()) and removal.can_slice_numbers(node, value):
        slice_numbers(module, computed)


def _require_slice(
    removal: Removal,
    path: str,
    module: nn.Module,
    small: nn.Module,
    source: Value,
    read: Tensor,
    write: Tensor,
    axis: int,
) -> None:
    """Raise CannotSlice unless ``small`` gives the channels ``write`` of the module's output, and trains if it does."""
    x = torch.randn(source.tensor.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(source.tensor)
    source_axis = removal.flow[source].axis
    shape = [-1 if d == source_axis else 1 for d in range(x.dim())]
    x = x * read.to(x).reshape(shape)
    part = x.index_select(source_axis, read.nonzero().flatten().to(x.device))
    try:
        wanted = run_seeded(module, as_inputs(x)).index_select(axis, write.nonzero().flatten().to(x.device))
        got = run_seeded(small, as_inputs(part))
    except Exception as error:  # whatever foreign code raises for fewer channels
        raise CannotSlice(path) from error
    if trains(module, x) and not trains(small, part):
        raise CannotSlice(path)
    if not distance(got, wanted) <= SLICE_ERROR:
        raise CannotSlice(path)


# -- what is put around them ---------------------------------------------------------------------------


def _behind(model: nn.Module, removal: Removal, value: Value) -> None:
    """Closed channels of a gated module that is no layer are dropped or made zero behind it."""
    path = removal.masks.paths[value]
    for outer, call in removal.sliced.items():  # which has become another module, whose parts may be gone
        path = outer if path.startswith(f"{outer}.") and call.outputs[0] is value else path
    node = value.node
    assert node is not None
    axis, kept = removal.flow[value].axis, removal.present[value]
    known, constant = removal.known[value], removal.constant[value]
    if bool(known.all() & kept.all()) and not bool(constant.any()) and removal.flow.is_guess(value):
        _frame(model, path, [], [("zeros", Zeros())])
        return
    after = _glue(removal.computed(node, value), kept, known, constant, value, axis)
    _frame(model, path, [], after)


def _gather(read: Tensor, held: Tensor, source: Value, axis: int) -> list[tuple[str, nn.Module]]:
    positions = (held.cumsum(0) - 1)[read]
    size = int(held.sum()) if source.tensor.dim() < 4 else None  # of a flattened map it follows from the image's
    return [("gather", GatherChannels(positions, axis, size))]


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    take_place(new, model.get_submodule(path), hooks=False)
    model.set_submodule(path, new)


def _glue(
    computed: Tensor, kept: Tensor, known: Tensor, constant: Tensor, value: Value, axis: int
) -> list[tuple[str, nn.Module]]:
    """Modules that make the channels ``kept`` of the channels ``computed``, constants among them."""
    taken = kept & computed & ~known
    if torch.equal(taken, computed) and torch.equal(taken, kept):
        return []
    modules: list[tuple[str, nn.Module]] = []
    if not torch.equal(taken, computed):
        modules.append(("pick", GatherChannels((computed.cumsum(0) - 1)[taken], axis)))
    if not torch.equal(taken, kept):
        fill = torch.where(taken, 0.0, constant)[kept].to(value.tensor.dtype)
        shape = [-1 if d == axis else 1 for d in range(value.tensor.dim())]
        modules.append(("scatter", ScatterChannels((kept.cumsum(0) - 1)[taken], fill.reshape(shape), axis)))
    return modules


def _frame(
    model: nn.Module, path: str, before: list[tuple[str, nn.Module]], after: list[tuple[str, nn.Module]]
) -> None:
    if not before and not after:
        return
    owner, module, name = model, model, ""
    for name in path.split("."):
        owner = module
        while isinstance(owner, Framed) and name not in owner._modules:  # of a block whose output has a frame
            owner = owner.layer
        module = getattr(owner, name)
    device = device_of(module, model)
    new = Framed(OrderedDict([*before, ("layer", module), *after])).train(module.training)
    framed = new if device is None else new.to(device)
    if isinstance(owner, Framed) and name != "layer" and owner._modules.keys().isdisjoint(n for n, _ in before + after):
        parts = list(owner.named_children())  # of a network that was compact before: one frame, which a file describes
        owner._modules.clear()
        for other, part in parts:
            inside = [(n if n != "layer" else name, m) for n, m in framed.named_children()]
            owner._modules.update(inside if other == name else [(other, part)])
        return
    owner.add_module(name, framed)
