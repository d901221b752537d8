"""Which BatchNorm layers look at the batches of all processes while steps are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gatedconv.gating.gate import LearnedGate
from gatedconv.gating.sync_norm import synchronised


@contextmanager
def synchronised_norms(model: nn.Module, which: str) -> Iterator[None]:
    """While it lasts, the norms of the gates ("gates") or all norms ("all") use statistics of the global batch.

    They are stand-ins that share parameters and buffers: what is evaluated, saved and cut are the plain ones.

    Args:
        model: the network.
        which: "off", "gates" or "all"; "all" takes PyTorch's SyncBatchNorm, which needs GPUs.

    Raises:
        ValueError: "all" on a CPU.
    """
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()) if which != "off" else []:
        for name, child in parent.named_children():
            twin = _twin(parent, child, which)
            if twin is not None:
                swapped.append((parent, name, child))
                parent._modules[name] = twin
    try:
        yield
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def _twin(parent: nn.Module, child: nn.Module, which: str) -> nn.Module | None:
    if isinstance(parent, LearnedGate) and isinstance(child, nn.BatchNorm1d):
        return synchronised(child)
    if which != "all" or not isinstance(child, nn.modules.batchnorm._BatchNorm):
        return None
    if child.weight is not None and not child.weight.is_cuda:
        raise ValueError("sync_norm: expected off or gates on CPUs, PyTorch's SyncBatchNorm needs GPUs; got 'all'")
    twin = torch.nn.SyncBatchNorm(
        child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
    )
    twin._parameters, twin._buffers, twin.training = child._parameters, child._buffers, child.training
    return twin
