"""The MACs that training steps execute and skip."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gatedconv.gating import MacTerm

# A training step costs a forward pass and, backward, about two more.
PASSES_PER_STEP = 3


class StepMacs:
    """Counts the MACs of training steps.

    Args:
        model: a network that carries ``mac_terms``; of any other, nothing is counted unless ``per_image`` is given.
        recompute: residual blocks run forward once more in backward: of our ResNets, all but stem and head.
        per_image: MACs of one forward pass of a network without ``mac_terms``.

    Attributes:
        per_image: MACs of one image, forward, with nothing skipped; 0 where they are unknown.
        executed: so far, forward and backward, repeated passes included.
        saved: skipped so far, forward and backward.
    """

    def __init__(self, model: nn.Module, *, recompute: bool = False, per_image: float = 0.0) -> None:
        terms: Sequence[MacTerm] = getattr(model, "mac_terms", ())
        self.per_image = sum(term.macs for term in terms) or per_image
        self._again = sum(term.macs for term in terms[1:-1]) if recompute else 0.0
        self._recomputes = recompute
        self.executed = self.saved = 0.0

    def add(self, images: int, skipped: float = 0.0, repeated: bool = False) -> None:
        """Count a pass, forward and backward, over some images.

        Args:
            images: of this process.
            skipped: MACs of one image, forward, that the pass did not execute.
            repeated: the pass was of no use, and is made again.
        """
        again = self._again - skipped if self._recomputes else 0.0
        self.executed += images * (PASSES_PER_STEP * (self.per_image - skipped) + again)
        if not repeated:
            self.saved += images * PASSES_PER_STEP * skipped

    def new_epoch(self) -> None:
        """Count from 0 again."""
        self.executed = self.saved = 0.0
