"""Which constants hold for images of the example's height and width alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import op_name, submodule
from gatedconv.convert.flow import SPATIAL_FUNCTIONS

if TYPE_CHECKING:
    from gatedconv.deploy.cut.facts import Facts

# Channels of one value everywhere: what rounding leaves between the pixels of an interpolation.
_UNIFORM = 1e-6
# Over an area: what they make of a uniform map depends on its size.
_EXTENSIVE = frozenset("sum norm logsumexp softmax".split())


def depends_on_size(facts: Facts, node: fx.Node, known: Tensor, value: Tensor) -> Tensor:
    """Bool (C,): constant channels of a node that images of another height and width would change.

    Those that differ from place to place, those worked out from such ones, and those of operations that see
    the border or the area. In doubt they do.
    """
    uniform = is_uniform(value, facts.flow[node].axis)
    return known & (~uniform | _inherited(facts, node, value))


def _inherited(facts: Facts, node: fx.Node, value: Tensor) -> Tensor:
    flow, channels = facts.flow, facts.flow[node]
    sources = [n for n in node.all_input_nodes if flow.has_channels(n)]
    if channels.kind == "move":
        return facts[channels.source].sized[channels.index]  # type: ignore[index]
    if channels.kind == "cat":
        parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
        return torch.cat([facts[p].sized for p in parts])
    if channels.kind == "binary":
        return _of_binary(facts, node, sources)
    if channels.kind in ("conv", "regroup"):
        source = sources[0]
        sized = facts[source].sized
        if channels.kind == "conv" and _sees_border(node):
            sized = sized | ~facts.zero(source)
        groups = flow[source].size // facts.weight(node).shape[1] if channels.kind == "conv" else channels.size
        return sized.reshape(groups, -1).any(dim=1).repeat_interleave(channels.size // groups)
    sized = torch.stack([facts[n].sized.any() for n in sources]).any() if sources else torch.tensor(False)
    if channels.kind == "channelwise":
        sized = facts[sources[0]].sized
    return sized | (_is_spatial(facts, node, sources) & (rows_of(value, channels.axis) != 0).any(dim=1))


def _of_binary(facts: Facts, node: fx.Node, sources: list[fx.Node]) -> Tensor:
    size = facts.flow[node].size
    sized = torch.stack([facts[n].sized.expand(size) for n in sources]).any(dim=0)
    if op_name(node) == "mul":  # nothing brings a closed gate's zeros back
        for source in sources:
            sized = sized & ~(facts.zero(source) & ~facts[source].sized).expand(size)
    return sized


def _sees_border(node: fx.Node) -> bool:
    module = submodule(node)
    if not isinstance(module, nn.Conv2d):
        return True
    padding = module.padding if isinstance(module.padding, tuple) else (0 if module.padding == "valid" else 1,)
    return any(padding) and max(module.kernel_size) > 1


def _is_spatial(facts: Facts, node: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether a uniform map may become numbers that depend on its size."""
    name, module = op_name(node), submodule(node)
    if facts.flow.kind(node) == "opaque":
        return any(n.meta["val"].dim() > 2 for n in sources)
    if isinstance(module, nn.AvgPool2d):
        return module.padding not in (0, (0, 0))
    if name == "avg_pool2d":
        return len(node.args) > 3 or "padding" in node.kwargs
    reads_size = any(facts.flow.kind(n) == "size" for n in node.all_input_nodes)
    return name in _EXTENSIVE or (reads_size and name not in SPATIAL_FUNCTIONS)


def is_uniform(value: Tensor, axis: int) -> Tensor:
    """Bool (C,): channels with one value everywhere."""
    rows = rows_of(value, axis)
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    return high - low <= _UNIFORM * high.abs().clamp(min=1e-3)


def rows_of(value: Tensor, axis: int) -> Tensor:
    """(C, everything else) of the first image."""
    return value[0].movedim(axis - 1, 0).reshape(value.shape[axis], -1)
