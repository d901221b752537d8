"""BatchNorm statistics of a network whose weights are final."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gatedconv.gating import eval_mode


@torch.no_grad()
def re_estimate_batchnorm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Re-estimate the running statistics of every BatchNorm as plain means over batches, in place.

    The running statistics of training remember sub-networks that are gone: re-estimate them after `freeze`, and
    before `compact`. Weights and modes are unchanged; so are
    the statistics where an exception ends it.

    Args:
        model: a network whose weights are final.
        batches: (images (N, C, H, W), labels (N,)) as in training, augmentation included; at least one.

    Raises:
        ValueError: there are no batches.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    done = False
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean
                norm.train()
            count = 0
            for images, _ in batches:
                model(images)
                count += 1
            if not count:
                raise ValueError("re_estimate_batchnorm: expected at least one batch, got none")
            done = True
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not done:
                    norm.load_state_dict(buffers, strict=False)
