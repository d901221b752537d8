"""Locates the first layer that a plan computes otherwise than PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert import verify
from gatedconv.engine.choose import Choose
from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.engine.fuse import fuse
from gatedconv.engine.lower import lower
from gatedconv.engine.partition import Segment, find_segments
from gatedconv.engine.plan_writer import write_program


def first_wrong_layer(
    source: nn.Module,
    body: nn.Module,
    inputs: verify.Inputs,
    *,
    example: Tensor,
    choose: Choose,
    dtype: torch.dtype = torch.float32,
) -> str:
    """The name of the first layer that differs, found by running CPU plans that are cut off after each layer in turn.

    Args:
        source: the network.
        body: the network with its plans.
        inputs: on which the two differ.
        example: the input for which the plans in ``body`` were written.
        choose: the choice of algorithms of these plans.
        dtype: of their products.
    """
    (x,) = inputs[0]
    traced = lower(source, example)
    run = _Values(traced)
    if not verify.is_same(run.run(x.clone()), source(x.clone())):
        return verify.first_difference(source, traced, inputs)
    for segment in find_segments(traced):
        for count in range(1, len(segment.layers) + 1):
            if not _is_right(segment, count, run.values, len(example), choose, dtype):
                return segment.layers[count - 1].name
    return verify.first_difference(source, body, inputs)


class _Values(fx.Interpreter):
    """Keeps every tensor."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node's value and keep it."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n] = result
        return result


def _is_right(
    segment: Segment, count: int, values: dict[fx.Node, Tensor], batch: int, choose: Choose, dtype: torch.dtype
) -> bool:
    """Whether a plan of a segment's first layers computes what PyTorch does; one that cannot be written is."""
    layers = [replace(layer) for layer in segment.layers[:count]]
    result = layers[-1].output
    try:
        fused = fuse(layers, result, change_inputs=True)
        plan = PlanModule(write_program(segment.source, fused, result, batch, choose, dtype))
    except (KeyError, ValueError):  # its result is no map that could leave a plan
        return True
    with torch.no_grad():
        found = plan(values[segment.source])
    return verify.distance(found, values[result]) <= verify.TOLERANCES[dtype]
