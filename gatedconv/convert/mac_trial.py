"""Where the MACs that a gated network promises are estimates: one trial against what compacting would leave."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from gatedconv.convert.channels import ChannelPlan
from gatedconv.convert.constants import Masks, groups_of
from gatedconv.convert.flow import Flow
from gatedconv.convert.record import Node, Value
from gatedconv.convert.record_macs import Gated, is_pool, per_element
from gatedconv.gating import MacTerm


def estimated_parts(flow: Flow, gated: Gated, terms: Mapping[Node, list[MacTerm]], caution: int = 0) -> dict[str, str]:
    """Module path -> by how much its terms were off, for the modules whose terms were, at two sets of random masks.

    Args:
        flow: of the model without gates.
        gated: its gates.
        terms: of ``node_terms``.
        caution: of the ``ChannelPlan``.
    """
    return _trial(flow, gated, terms, caution, 0.5) | _trial(flow, gated, terms, caution, 0.0)


def _trial(flow: Flow, gated: Gated, terms: Mapping[Node, list[MacTerm]], caution: int, share: float) -> dict[str, str]:
    """Of the channels ``share`` are open, and at least one; of the branches a half."""
    sizes = dict((*gated.values.values(), *gated.inputs.values())) | dict.fromkeys(gated.ends.values(), 1)
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(size, generator=generator) < (share if size > 1 else 0.5) for n, size in sizes.items()}
    for mask in masks.values():
        mask[0] |= mask.numel() > 1 and not bool(mask.any())
    values: dict[Value, Tensor] = {value: masks[name] for value, (name, _) in gated.values.items()}
    for value, name in gated.ends.items():
        if not bool(masks[name]) and flow.has_channels(value):
            values[value] = torch.zeros(flow[value].size, dtype=torch.bool)
    inputs = {key: masks[name] for key, (name, _) in gated.inputs.items()}
    channels = ChannelPlan(flow, Masks(values, inputs, {}), caution)
    promised: dict[str, float] = defaultdict(float)
    left: dict[str, float] = defaultdict(float)
    for node, found in terms.items():
        if found:
            promised[node.scope] += math.fsum(_at(term, masks) for term in found)
            left[node.scope] += math.fsum(term.macs for term in found) * _share(node, channels)
    return {
        path: f"{promised[path]:,.0f} MACs expected where {left[path]:,.0f} are left, in a trial"
        for path in promised
        if abs(promised[path] - left[path]) >= 0.5
    }


def _at(term: MacTerm, masks: Mapping[str, Tensor]) -> float:
    macs = term.macs
    for name, which in zip(term.gates, term.channels or [None] * len(term.gates), strict=True):
        mask = masks[name] if which is None else masks[name][list(which)]
        macs *= float(mask.double().mean())
    return macs


def _share(node: Node, channels: ChannelPlan) -> float:
    """0 to 1: how much of a node's work is left in the compact network."""
    flow, value = channels.flow, node.outputs[0]
    kind = flow.kind(value)
    if kind in ("conv", "linear"):
        if not channels.is_sliceable(node):
            return float(not channels.is_dead(node))
        read, write = (m.reshape(groups_of(node.module), -1).double() for m in channels.layer_channels(node, value))
        return float((read.sum(1) * write.sum(1)).sum()) / (read.shape[1] * write.numel())
    if channels.is_idle(node):
        return 0.0
    if kind != "elementwise" or not per_element(node):
        return 1.0
    held = channels.present[flow.source(node)] if is_pool(node) else channels.computed(node, value)
    return float(held.double().mean())
