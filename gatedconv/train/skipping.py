"""Training that gets cheaper as gates agree: shut blocks are left out, and what that saves is counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gatedconv.gating import MacTerm
from gatedconv.gating.gate import LearnedGate
from gatedconv.nn import BasicBlock
from gatedconv.nn.skip import BlockSkip, is_closed
from gatedconv.train.distributed import ALONE, Ranks
from gatedconv.train.step_macs import StepMacs


class BlockSkipping:
    """Chooses the blocks that a step leaves out; `gatedconv.nn.skip` says why that is exact.

    On the CPU each block decides when its gate has seen the batch, on each rank for itself: to agree would take a
    message per block. The statistics of a rank that left a block out enter the ranks' mean as they stood; they are
    used in evaluation only, and catch up like those of all. On a GPU deciding at once would make the host wait in
    every block: there the step before decides, and `verified` checks once the backward pass is in the queue,
    from a copy made after the forward pass, so that the device is never idle. If a gate opened after all, the
    step is to be done again with nothing left out.

    Only blocks whose layer gate is all their gates take part: a channel gate inside a block that is left out
    would miss the gradient of its own losses.

    Args:
        model: a network; without such blocks nothing is ever left out.
        device: that it trains on.
        predict: let the step before decide; None for what suits the device.
        ranks: the processes that train together; where the step before decides, they leave out the same.
        macs: told of every pass and of what it left out; None for a count of its own.

    Attributes:
        macs: what was executed and what was left out.
        repeated: steps that had to be done again.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        predict: bool | None = None,
        ranks: Ranks = ALONE,
        macs: StepMacs | None = None,
    ) -> None:
        self.macs = macs or StepMacs(model)
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
        self._shut = self._flags = torch.zeros(len(costs), dtype=torch.bool)
        if device.type == "cuda":
            self._flags = self._flags.pin_memory()
            self._copied = torch.cuda.Event()

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, the blocks of the network leave themselves out."""
        for block, skip in zip(self._blocks.values(), self._skips, strict=True):
            block.skip = skip
        try:
            yield
        finally:
            for block in self._blocks.values():
                block.skip = None

    @torch.no_grad()
    def note_forward(self, images: int, *, first: bool = True) -> None:
        """Take down which gates are shut for the images that have just gone through; `first` begins a step."""
        if not self.predict:
            self.macs.add(images, self._left_out())
            return
        shut = torch.stack([is_closed(gate) for gate in self._gates()])
        self._shut = shut if first else self._shut & shut
        # Every rank has to leave out, or repeat, the same.
        agreed = self._ranks.sum(self._shut.int()) == self._ranks.world if self._ranks.world > 1 else self._shut
        self._flags.copy_(agreed, non_blocking=True)
        if agreed.is_cuda:
            self._copied.record()

    def verified(self, images: int) -> bool:
        """Whether every block that a step over so many images left out was shut; decides for the next step.

        After False, nothing is left out of the next forward pass.
        """
        if not self.predict:
            return True
        if self._flags.is_pinned():
            self._copied.synchronize()
        flags = self._flags.tolist()
        wrong = any(skip.closed and not shut for skip, shut in zip(self._skips, flags, strict=True))
        self.repeated += wrong
        self.macs.add(images, self._left_out(), made_again=wrong)
        for skip, shut in zip(self._skips, flags, strict=True):
            skip.closed = shut and not wrong
        return not wrong

    def _left_out(self) -> float:
        """Multiply-accumulates of one image that the last forward pass did without."""
        return sum(cost for cost, skip in zip(self._costs, self._skips, strict=True) if skip.closed)

    def _gates(self) -> list[LearnedGate]:
        return [block.layer_gate for block in self._blocks.values() if isinstance(block.layer_gate, LearnedGate)]


def _skippable(model: nn.Module) -> dict[str, BasicBlock]:
    return {
        name: block
        for name, block in model.named_modules()
        if isinstance(block, BasicBlock) and isinstance(block.layer_gate, LearnedGate) and block.channel_gate is None
    }
