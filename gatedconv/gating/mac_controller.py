"""A closed loop on the MACs: the weight of their price follows what is measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedconv.gating.losses import global_open_rates
from gatedconv.gating.mac_terms import expected_macs, mac_terms


class MacController(nn.Module):
    """Integral controller: the price of MACs rises while the net is above the MACs wanted, falls while below.

    A fixed weight in front of ``mac_target_loss`` balances the task's pull at some distance from the target; a
    price that goes on moving until the distance is 0 lands on it.

    Args:
        gain: change of the price in one step for MACs that are off by the dense network's, above 0.

    Attributes:
        price: buffer (), of the dense network's MACs in units of the loss. It belongs into a checkpoint.
    """

    price: Tensor

    def __init__(self, gain: float) -> None:
        super().__init__()
        if not gain > 0:
            raise ValueError(f"MacController: gain must be above 0, got {gain!r}")
        self.gain = gain
        self.register_buffer("price", torch.zeros(()))

    def forward(self, model: nn.Module, wanted: float | Tensor) -> Tensor:
        """The loss of one step, a scalar: price * (MACs / dense MACs), the price moved just before.

        Args:
            model: a gated model that has seen a batch.
            wanted: MACs wanted now as a share of the dense model's, in (0, 1]; a scalar tensor is not checked.
        """
        if not isinstance(wanted, Tensor) and not 0 < wanted <= 1:  # to look at it may wait for a device
            raise ValueError(f"MacController: wanted must be in (0, 1], got {wanted!r}")
        total = sum(term.macs for term in mac_terms(model, "MacController"))
        share = expected_macs(model, global_open_rates(model, "MacController")) / total
        with torch.no_grad():
            self.price += self.gain * (share - wanted)
        return self.price.clone() * share
