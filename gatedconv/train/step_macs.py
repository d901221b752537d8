"""Multiply-accumulates that training executes: of every pass that was made, whether or not it was of use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gatedconv.gating import MacTerm

# A training step costs a forward pass and, backward, about two more.
PASSES_PER_STEP = 3


class StepMacs:
    """Adds up the multiply-accumulates of training steps.

    Args:
        model: a network that carries ``mac_terms``; of any other, nothing is counted unless ``per_image`` is given.
        recompute: residual blocks run forward once more in backward: of our ResNets, all but stem and head.
        per_image: of one forward pass of a network that does not carry them.

    Attributes:
        per_image: multiply-accumulates of one image, forward, with nothing left out; 0 where they are unknown.
        executed: so far, forward and backward, passes that had to be made again included.
        saved: so far, what steps left out of the whole network, forward and backward.
    """

    def __init__(self, model: nn.Module, *, recompute: bool = False, per_image: float = 0.0) -> None:
        terms: Sequence[MacTerm] = getattr(model, "mac_terms", ())
        self.per_image = sum(term.macs for term in terms) or per_image
        self._again = sum(term.macs for term in terms[1:-1]) if recompute else 0.0
        self._recomputes = recompute
        self.executed = self.saved = 0.0

    def add(self, images: int, left_out: float = 0.0, *, made_again: bool = False) -> None:
        """Count a pass, forward and backward, over so many images.

        Args:
            images: of this process.
            left_out: multiply-accumulates of one image, forward, that the pass did without.
            made_again: the pass was of no use.
        """
        again = self._again - left_out if self._recomputes else 0.0
        self.executed += images * (PASSES_PER_STEP * (self.per_image - left_out) + again)
        if not made_again:
            self.saved += images * PASSES_PER_STEP * left_out

    def new_epoch(self) -> None:
        """Count from 0 again."""
        self.executed = self.saved = 0.0
