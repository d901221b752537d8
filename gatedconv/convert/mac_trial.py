"""Where the MACs of record_macs.py are an estimate: a trial of random masks against what compacting would leave."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from gatedconv.convert.channels import Removal
from gatedconv.convert.constants import Masks
from gatedconv.convert.flow import Flow
from gatedconv.convert.install import over_channels
from gatedconv.convert.module_kinds import groups_of
from gatedconv.convert.record import Node
from gatedconv.convert.record_macs import GatePlaces, is_pool, per_element
from gatedconv.gating import MacTerm


def estimated_parts(
    flow: Flow, gated: GatePlaces, terms: Mapping[Node, list[MacTerm]], caution: int = 0
) -> dict[str, str]:
    """Module path -> by how much its terms were off, for the modules whose terms were, at sets of random masks.

    Args:
        flow: of the model without gates.
        gated: its gates.
        terms: of ``node_terms``.
        caution: of the ``Removal``.
    """
    found = _trial(flow, gated, terms, caution, 0.5) | _trial(flow, gated, terms, caution, 0.0)
    return found | (_trial(flow, gated, terms, caution, 0.5, branches=0.0) if gated.ends else {})


def _trial(
    flow: Flow,
    gated: GatePlaces,
    terms: Mapping[Node, list[MacTerm]],
    caution: int,
    share: float,
    branches: float = 0.5,
) -> dict[str, str]:
    """A trial of random masks: a share of each gate's channels is open, at least one, and a share of the branches."""
    sizes = dict((*gated.values.values(), *gated.inputs.values())) | dict.fromkeys(gated.ends.values(), 1)
    generator = torch.Generator().manual_seed(0)
    masks = {
        n: torch.rand(size, generator=generator, device="cpu") < (share if size > 1 else branches)
        for n, size in sizes.items()
    }
    for mask in masks.values():
        mask[0] |= mask.numel() > 1 and not bool(mask.any())
    values = {value: over_channels(masks[name], flow[value].size) for value, (name, _) in gated.values.items()}
    for value, name in gated.ends.items():
        if not bool(masks[name]) and flow.has_channels(value):
            values[value] = torch.zeros(flow[value].size, dtype=torch.bool, device="cpu")
    inputs = {key: over_channels(masks[name], flow[key[1]].size) for key, (name, _) in gated.inputs.items()}
    removal = Removal(flow, Masks(values, inputs, {}), caution)
    promised: dict[str, float] = defaultdict(float)
    left: dict[str, float] = defaultdict(float)
    for node, found in terms.items():
        if found:
            promised[node.scope] += math.fsum(_at(term, masks) for term in found)
            left[node.scope] += math.fsum(term.macs for term in found) * _share_left(node, removal)
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


def _share_left(node: Node, removal: Removal) -> float:
    """0 to 1: how much of a node's work is left in the compact network."""
    flow, value = removal.flow, node.outputs[0]
    kind = flow.kind(value)
    if kind in ("conv", "linear"):
        if not removal.is_sliceable(node):
            return float(not removal.is_dead(node))
        read, write = (m.reshape(groups_of(node.module), -1).double() for m in removal.layer_channels(node, value))
        return float((read.sum(1) * write.sum(1)).sum()) / (read.shape[1] * write.numel())
    if removal.is_idle(node):
        return 0.0
    if kind not in ("elementwise", "group_norm") or not per_element(node):
        return 1.0
    held = removal.present[flow.source(node)] if is_pool(node) else removal.computed(node, value)
    return float(held.double().mean())
