"""Gradient checkpointing: residual blocks are computed again in backward, without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gatedconv.gating import Gate
from gatedconv.nn import BasicBlock


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Context in which every residual block keeps its input only, and computes the rest again in backward.

    The second pass has no side effects: running statistics, open rates and random numbers are those of the first.

    Raises:
        ValueError: the model has no residual blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    if not blocks:
        raise ValueError(f"recompute: expected a network of residual blocks, got {type(model).__name__}")
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _checkpointed(block: BasicBlock, forward: Any, *inputs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _without_side_effects(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _without_side_effects(block: nn.Module) -> Iterator[None]:
    """Give the block copies of its buffers: a change of the real ones would invalidate what backward keeps."""
    held = [(module, name, buffer) for module in block.modules() for name, buffer in module._buffers.items()]
    gates = [module for module in block.modules() if isinstance(module, Gate)]
    last_calls = [(gate, gate.logits, gate.open_rate, gate.global_open_rate) for gate in gates]
    for module, name, buffer in held:
        if buffer is not None:
            module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer
        for gate, logits, open_rate, global_open_rate in last_calls:
            gate.logits, gate.open_rate, gate.global_open_rate = logits, open_rate, global_open_rate
