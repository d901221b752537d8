"""Gradient checkpointing: a block's inner results are computed again in backward, not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatedconv.gating import Gate
from gatedconv.nn import BasicBlock


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """While it lasts, every residual block of the model keeps its input only, and computes the rest twice.

    The second pass leaves no trace: running statistics, open rates and random numbers are those of the first.

    Raises:
        ValueError: the model has no residual blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    if not blocks:
        raise ValueError(f"recompute: expected a network of residual blocks, got {type(model).__name__}")
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _forward(block: BasicBlock, forward: Any, *inputs: Tensor | None) -> Tensor:
    if not (block.training and torch.is_grad_enabled()):
        out: Tensor = forward(*inputs)
        return out

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _untouched(block)

    out = checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)
    return out


@contextmanager
def _untouched(block: nn.Module) -> Iterator[None]:
    """Lend the block copies of its buffers: changing the real ones would invalidate what backward keeps."""
    held = [(module, name, buffer) for module in block.modules() for name, buffer in module._buffers.items()]
    gates = [(gate, gate.logits, gate.open_rate) for gate in block.modules() if isinstance(gate, Gate)]
    for module, name, buffer in held:
        if buffer is not None:
            module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer
        for gate, logits, open_rate in gates:
            gate.logits, gate.open_rate = logits, open_rate
