"""A closed loop on the MACs: an integral controller sets the weight of the MACs in the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedconv.gating.losses import global_open_rates
from gatedconv.gating.mac_terms import expected_macs, mac_terms


class MacController(nn.Module):
    """Integral controller: the price of MACs rises while the model is above its target, and falls while it is below.

    A fixed weight of ``mac_target_loss`` balances the pull of the task at some distance from the target; a price that
    changes until the distance is 0 reaches it.

    Args:
        gain: change of the price in one step for MACs that are off by the dense network's, above 0.

    Attributes:
        price: buffer (), of the dense network's MACs in units of the loss. Part of the state dict.
    """

    price: Tensor

    def __init__(self, gain: float) -> None:
        super().__init__()
        if not gain > 0:
            raise ValueError(f"MacController: gain must be above 0, got {gain!r}")
        self.gain = gain
        self.register_buffer("price", torch.zeros(()))

    def forward(self, model: nn.Module, target: float | Tensor) -> Tensor:
        """The loss of one step, a scalar: price * (MACs / dense MACs), the price moved just before.

        Args:
            model: a gated model that has seen a batch.
            target: MACs to reach now, as a share of the dense model's, in (0, 1]; a scalar tensor is not checked.
        """
        if not isinstance(target, Tensor) and not 0 < target <= 1:  # reading a tensor may synchronize
            raise ValueError(f"MacController: target must be in (0, 1], got {target!r}")
        total = sum(term.macs for term in mac_terms(model, "MacController"))
        share = expected_macs(model, global_open_rates(model, "MacController")) / total
        with torch.no_grad():
            self.price += self.gain * (share - target)
        return self.price.clone() * share
