"""Open rates over the parts of a batch that is computed one part after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedconv.gating.registry import require_gates


class RateWindow(nn.Module):
    """The open rates of the last ``parts`` batches of a model, of which only the current one has a gradient.

    They are buffers: they belong into a checkpoint, and whoever undoes a step undoes them with the rest.

    Args:
        model: a gated model, where it trains.
        parts: batches that count, at least 2.

    Attributes:
        before: buffer (parts - 1, G), the joined rates of the batches before, the oldest first, zeros where there
            was none yet.
        seen: buffer (), how many of them are filled.
    """

    before: Tensor
    seen: Tensor

    def __init__(self, model: nn.Module, parts: int) -> None:
        super().__init__()
        if parts < 2:
            raise ValueError(f"RateWindow: parts must be at least 2, got {parts}")
        like = torch.cat([gate.running_open_rate for gate in require_gates(model, "RateWindow").values()])
        self.parts = parts
        self.register_buffer("before", like.new_zeros(parts - 1, like.numel()))
        self.register_buffer("seen", like.new_zeros(()))

    def mix(self, joined: Tensor) -> Tensor:
        """Take in the joined rates (G,) of a batch; returns their mean with those before, the gradient 1 / parts."""
        now = joined.detach()
        with torch.no_grad():
            mean = (self.before.sum(dim=0) + now) / (self.seen + 1)
            self.before.copy_(torch.cat([self.before[1:], now[None]]))
            self.seen.add_(1).clamp_(max=len(self.before))
        return mean + (joined - now) / self.parts
