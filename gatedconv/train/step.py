"""One step of training: forward, losses, backward, optimiser, in as many parts as `accumulate` asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gatedconv.gating import find_gates
from gatedconv.gating.losses import RateWindow, accumulating
from gatedconv.train.config import TrainConfig
from gatedconv.train.distributed import ALONE, Ranks, parallel
from gatedconv.train.guard import Buffers, StepGuard, judged_at_once
from gatedconv.train.recipe import (
    GateWeights,
    gate_loss,
    gate_weights,
    learning_rate,
    lesson,
    make_controller,
    make_optimizer,
    make_pruner,
    mixed_dtype,
    prune_gates,
    set_learning_rate,
    task_loss,
    tuned_convolutions,
)
from gatedconv.train.recompute import recomputing
from gatedconv.train.skipping import BlockSkipping
from gatedconv.train.step_macs import StepMacs
from gatedconv.train.sync_norm import synchronised_norms


class StepResult(NamedTuple):
    """What a step showed: logits (B, classes), the loss and its polarization part (), whether it was bad ()."""

    logits: Tensor
    loss: Tensor
    polarization: Tensor | None
    bad: Tensor


# Sees what a step showed, and its labels; on the device, without looking at values.
Observer = Callable[[StepResult, Tensor], None]


class Stepper:
    """Makes steps on a network, in place.

    Args:
        model: the network, where it is to train.
        config: the recipe.
        device: of the network.
        ranks: the processes that train it together.
        predict_skips: for tests: let the step before decide what is left out, as on a GPU.
        macs_per_image: of a network that was cut: it carries no ``mac_terms``, and has no blocks to recompute.
        observe: called at the end of each step.

    Attributes:
        parts: what has a state, by name: model, optimizer, scaler and, where they exist, controller, pruner and
            window.
        guard: counts the bad steps.
        skipping: leaves out blocks that are shut.
        macs: counts what was executed, and what was left out.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
        *,
        predict_skips: bool | None = None,
        macs_per_image: float = 0.0,
        observe: Observer | None = None,
    ) -> None:
        self.model, self.config, self.device, self.ranks = model, config, device, ranks
        self.observe: Observer = observe or (lambda result, labels: None)
        self._at_once = judged_at_once(device)
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        half = mixed_dtype(config, device)
        self.autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)
        self.parts: dict[str, Any] = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.controller = make_controller(model, config)
        if self.controller is not None:
            self.parts["controller"] = self.controller.to(device)
        self.pruner = make_pruner(model, config)
        if self.pruner is not None:
            self.parts["pruner"] = self.pruner.to(device)
        self._gated = bool(find_gates(model))
        self.window = RateWindow(model, config.accumulate) if self._gated and config.accumulate > 1 else None
        if self.window is not None:
            self.parts["window"] = self.window
        self.network = parallel(_compiled(model, config), ranks)
        movable = (model, self.controller, self.pruner, self.window)
        moving = nn.ModuleList([part for part in movable if part is not None])
        self.guard = StepGuard(moving, device)
        skips = config.skip_blocks and not config.compile
        self._recompute = config.recompute and not macs_per_image
        self.macs = StepMacs(model, recompute=self._recompute, per_image=macs_per_image)
        self.skipping = BlockSkipping(
            model if skips else nn.Module(), device, predict=predict_skips, ranks=ranks, macs=self.macs
        )
        self._before = Buffers(moving) if self.skipping.predict else None
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, the network behaves as the steps of `config` need it."""
        with ExitStack() as stack:
            stack.enter_context(tuned_convolutions(self.device))
            stack.enter_context(accumulating(self.model, self.window))
            if self.ranks.world > 1:
                stack.enter_context(synchronised_norms(self.model, self.config.sync_norm))
            stack.enter_context(self.skipping.active())
            if self._recompute:
                stack.enter_context(recomputing(self.model))
            yield

    def join(self, weight: float) -> None:
        """Make the running statistics the same on every rank, as they go into a checkpoint; a collective.

        Args:
            weight: of this rank's images among its fellows', 1 on average.
        """
        self.ranks.average_buffers(self.model, weight)
        if self.pruner is not None:
            self.pruner.average_over_ranks()

    def __call__(self, images: Tensor, labels: Tensor, epoch: float, taught: Tensor | None = None) -> StepResult:
        """Make a step at `epoch` (a step within an epoch is a fraction of one) on (B, C, H, W) and int64 (B,).

        ``taught`` are a teacher's logits (B, classes) on the images.
        """
        set_learning_rate(self.optimizer, learning_rate(self.config, epoch))
        if self._at_once:
            self.guard.buffers.keep()
        if self._before is not None:
            self._before.keep()
        result = self._forward_backward(images, labels, epoch / self.config.epochs, taught)
        if not self.skipping.verified(len(images)) and self._before is not None:
            self._before.put_back()
            result = self._forward_backward(images, labels, epoch / self.config.epochs, taught)
            self.skipping.verified(len(images))
        result = self._update(result)
        self.observe(result, labels)
        progress = epoch / self.config.epochs
        if self.pruner is not None:
            prune_gates(self.pruner, self.config, progress)
        return result

    def _forward_backward(self, images: Tensor, labels: Tensor, progress: float, taught: Tensor | None) -> StepResult:
        count = self.config.accumulate
        # DistributedDataParallel gives each rank the same say; ranks may hold one image more or less.
        weight = len(images) * self.ranks.world / self.config.batch_size
        shown, loss, polarization = [], torch.zeros((), device=self.device), None
        lessons = [None] * count if taught is None else taught.tensor_split(count)
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(images.tensor_split(count), labels.tensor_split(count), lessons, strict=True)
        for index, (x, y, theirs) in enumerate(parts):
            wait = self.ranks.world > 1 and index < count - 1
            with self.network.no_sync() if wait else nullcontext():  # type: ignore[operator]
                with self.autocast:
                    logits = self.network(x)
                self.skipping.note_forward(len(x), first=index == 0)
                task, share = task_loss(logits, y, self.config), len(x) / len(images)
                if theirs is not None:
                    task = lesson(task, logits, theirs, self.config)
                whole = task if share * weight == 1 else task * (share * weight)
                loss += task.detach() * share
                if self._gated:
                    of_gates, polar = gate_loss(self.model, self.config, self._weights(progress), self.controller)
                    whole = whole + of_gates
                    loss += of_gates.detach() / count
                    polarization = polar.detach() / count + (0 if polarization is None else polarization)
                self.scaler.scale(whole).backward()
            # A CUDA graph of the network writes the next part's logits over these.
            shown.append(logits.detach().clone() if count > 1 else logits.detach())
        return StepResult(shown[0] if count == 1 else torch.cat(shown), loss, polarization, loss)

    def _weights(self, progress: float) -> GateWeights:
        return gate_weights(self.config, progress)

    def _update(self, result: StepResult) -> StepResult:
        """Change the weights, unless the loss or the gradient is not finite."""
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.config.grad_clip:
            clip_grads_with_norm_(self._parameters, self.config.grad_clip, norm)
        bad = ~self._finite(result.loss, norm)
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by the fused kernel
            self.optimizer.step()
        if self._at_once and bool(bad):
            self.guard.buffers.put_back()
        self.guard.count(bad)
        return result._replace(bad=bad)

    def _finite(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Bool (), the same on every rank: whether the loss, of all ranks, and the norm of the gradient are finite."""
        finite = norm.isfinite()
        if not self.scaler.is_enabled():  # a rank's loss is in the gradient of all
            return finite if self.ranks.world > 1 else finite & loss.isfinite()
        # A gradient may overflow for its scale, which the scaler then lowers; where nothing is scaled up, it is broken.
        overflowed = self.scaler.scale(torch.ones((), device=self.device)) > 1
        broken = self.ranks.sum(loss.isfinite().logical_not().int())
        return (finite | overflowed) & (broken == 0)


def _compiled(model: nn.Module, config: TrainConfig) -> nn.Module:
    """The network as `compile` wants it run; always one graph."""
    if not config.compile:
        return model
    compiled: nn.Module = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
    return compiled
