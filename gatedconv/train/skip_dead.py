"""Training steps that skip residual blocks which their layer gate closes for the whole batch, and the MACs of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gatedconv.gating import MacTerm
from gatedconv.gating.gates import LearnedGate
from gatedconv.nn import BasicBlock
from gatedconv.nn.skip import BlockSkip, is_closed
from gatedconv.train.distributed import SINGLE, Ranks

CountPass = Callable[[int, float, bool], None]  # images, MACs of one image that were skipped, pass made again

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
            repeated: the result of the pass is discarded, and the pass is made again.
        """
        again = self._again - skipped if self._recomputes else 0.0
        self.executed += images * (PASSES_PER_STEP * (self.per_image - skipped) + again)
        if not repeated:
            self.saved += images * PASSES_PER_STEP * skipped

    def new_epoch(self) -> None:
        """Count from 0 again."""
        self.executed = self.saved = 0.0


class BlockSkipping:
    """Decides which blocks a step skips; `gatedconv.nn.skip` explains why that is exact.

    On the CPU each block decides when its gate has seen the batch, on each rank by itself: agreement would take a
    message per block. The statistics of a rank that skipped a block enter the mean over ranks unchanged; only the
    evaluation uses them. On a GPU that decision would make the host wait in every block: the previous step decides,
    and `verified` checks once the backward pass is queued, from a copy made after the forward pass, so that the
    device is never idle. If a gate opened after all, the step is made again with nothing skipped.

    Only blocks with a layer gate alone take part: the losses of a channel gate in a skipped block would get no
    gradient.

    Args:
        model: a network; without such blocks nothing is ever skipped.
        device: that it trains on.
        count: receives every pass: images, MACs skipped per image, whether the pass is made again.
        predict: the previous step decides; None for what suits the device.
        ranks: the processes that train together; where the previous step decides, they skip the same blocks.

    Attributes:
        repeated: steps that were made again.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        count: CountPass = lambda images, skipped, repeated: None,
        *,
        predict: bool | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self._count = count
        self._blocks = _skippable(model)
        self.predict = bool(self._blocks) and (device.type == "cuda" if predict is None else predict)
        costs = dict.fromkeys(self._blocks, 0.0)
        terms: Sequence[MacTerm] = getattr(model, "mac_terms", ())
        for term in terms:
            for name in costs.keys() & {gate.rpartition(".")[0] for gate in term.gates}:
                costs[name] += term.macs
        self._costs = list(costs.values())
        self._skips = [BlockSkip(now=not self.predict) for _ in self._blocks]
        self._ranks = ranks
        self.repeated = 0
        self._closed = self._flags = torch.zeros(len(costs), dtype=torch.bool)
        if device.type == "cuda":
            self._flags = self._flags.pin_memory()
            self._copied = torch.cuda.Event()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the blocks of the network skip themselves."""
        for block, skip in zip(self._blocks.values(), self._skips, strict=True):
            block.skip = skip
        try:
            yield
        finally:
            for block in self._blocks.values():
                block.skip = None

    @torch.no_grad()
    def note_forward(self, images: int, *, first: bool = True) -> None:
        """Record which gates are closed for the images of the forward pass just made; `first` begins a step."""
        if not self.predict:
            self._count(images, self._skipped(), False)
            return
        closed = torch.stack([is_closed(gate) for gate in self._gates()])
        self._closed = closed if first else self._closed & closed
        # Every rank has to skip, or repeat, the same.
        agreed = self._ranks.sum(self._closed.int()) == self._ranks.world if self._ranks.world > 1 else self._closed
        self._flags.copy_(agreed, non_blocking=True)
        if agreed.is_cuda:
            self._copied.record()

    def verified(self, images: int) -> bool:
        """Whether every block that a step over some images skipped was closed; decides for the next step.

        After False, the next forward pass skips nothing.
        """
        if not self.predict:
            return True
        if self._flags.is_pinned():
            self._copied.synchronize()
        flags = self._flags.tolist()
        wrong = any(skip.closed and not closed for skip, closed in zip(self._skips, flags, strict=True))
        self.repeated += wrong
        self._count(images, self._skipped(), wrong)
        for skip, closed in zip(self._skips, flags, strict=True):
            skip.closed = closed and not wrong
        return not wrong

    def _skipped(self) -> float:
        """MACs of one image that the last forward pass did not execute."""
        return sum(cost for cost, skip in zip(self._costs, self._skips, strict=True) if skip.closed)

    def _gates(self) -> list[LearnedGate]:
        return [block.layer_gate for block in self._blocks.values() if isinstance(block.layer_gate, LearnedGate)]


def _skippable(model: nn.Module) -> dict[str, BasicBlock]:
    return {
        name: block
        for name, block in model.named_modules()
        if isinstance(block, BasicBlock) and isinstance(block.layer_gate, LearnedGate) and block.channel_gate is None
    }
