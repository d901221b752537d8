"""One step of training: forward, losses, backward, optimizer, and the guard against numbers that are not finite.

Read `Stepper.__call__`, then `Stepper._forward_backward`: that is the method of the paper, in as many parts as
`accumulate` sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gatedconv.gating import GatePruner, MacController, find_gates
from gatedconv.gating.losses import RateWindow, accumulating
from gatedconv.train.config import TrainConfig
from gatedconv.train.device import mixed_dtype, tuned_convolutions
from gatedconv.train.distributed import SINGLE, Ranks, parallel, synchronized_norms
from gatedconv.train.optimizer import Lookahead, learning_rate, make_optimizer
from gatedconv.train.recipe import GateWeights, distillation_loss, gate_loss, gate_weights, mac_share_at, task_loss
from gatedconv.train.recompute import recomputing
from gatedconv.train.skip_dead import BlockSkipping, StepMacs

# More bad steps in a row, or in an epoch, end the run.
MOST_IN_A_ROW = 3
MOST_IN_AN_EPOCH = 20


class StepResult(NamedTuple):
    """What a step found.

    Attributes:
        logits: (B, classes).
        loss: the total loss, a scalar.
        polarization: its polarization part before the weight, a scalar; None without gates.
        open_rates: (G,) of all gates over the batch; None without gates.
        bad: bool (): whether the loss or the gradient was not finite; None before the update that checks them.
    """

    logits: Tensor
    loss: Tensor
    polarization: Tensor | None
    open_rates: Tensor | None
    bad: Tensor | None = None


# Receives the result of a step, and its labels; on the device, without reading values.
Observer = Callable[[StepResult, Tensor], None]


class Stepper:
    """Trains a network in place, step by step.

    Args:
        model: the network, on its device.
        config: the recipe.
        device: of the network.
        ranks: the processes that train it together.
        macs_per_image: of a compact network: it carries no ``mac_terms``, and has no blocks to recompute.
        observe: called at the end of each step.

    Attributes:
        parts: what has a state, by name: model, optimizer, scaler and, where they exist, controller, pruner,
            window and lookahead.
        guard: counts the bad steps.
        skipping: skips blocks that their gates close.
        macs: counts the MACs that were executed and skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = SINGLE,
        *,
        macs_per_image: float = 0.0,
        observe: Observer | None = None,
    ) -> None:
        self.model, self.config, self.device, self.ranks = model, config, device, ranks
        self.observe: Observer = observe or (lambda result, labels: None)
        self._immediate = checks_immediately(device)
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        half = mixed_dtype(config.amp, device)
        self.autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)
        self._gates = list(find_gates(model).values())
        control = config.mac_control if self._gates else ""
        gain = config.mac_gain / config.accumulate  # it is called once for each part of a batch
        self.controller = MacController(gain) if control == "price" else None
        self.pruner = GatePruner(model, even=config.mac_rank == "each") if control == "rank" else None
        self.window = RateWindow(model, config.accumulate) if self._gates and config.accumulate > 1 else None
        self.parts: dict[str, Any] = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        for name, part in (("controller", self.controller), ("pruner", self.pruner), ("window", self.window)):
            if part is not None:
                self.parts[name] = part.to(device)
        self.lookahead = Lookahead(model, config.lookahead) if config.lookahead else None
        if self.lookahead is not None:
            self.parts["lookahead"] = self.lookahead
        self.network = parallel(_compiled(model, config.compile), ranks)
        stateful = nn.ModuleList([part for part in self.parts.values() if isinstance(part, nn.Module)])
        self.guard = StepGuard(stateful, device)
        self._recompute = config.recompute and not macs_per_image
        self.macs = StepMacs(model, recompute=self._recompute, per_image=macs_per_image)
        skips = config.skip_blocks and not config.compile
        self.skipping = BlockSkipping(model if skips else nn.Module(), device, self.macs.add, ranks=ranks)
        self._before = Buffers(stateful) if self.skipping.predict else None
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which steps are made: the network behaves as `config` sets."""
        with ExitStack() as stack:
            stack.enter_context(tuned_convolutions(self.device))
            stack.enter_context(accumulating(self.model, self.window))
            if self.ranks.world > 1:
                stack.enter_context(synchronized_norms(self.model, self.config.sync_norm))
            stack.enter_context(self.skipping.active())
            if self._recompute:
                stack.enter_context(recomputing(self.model))
            yield

    def average(self, weight: float) -> None:
        """Average running statistics over the ranks, for a checkpoint; a collective.

        Args:
            weight: of this rank's images, 1 on average over the ranks.
        """
        self.ranks.average_buffers(self.model, weight)
        if self.pruner is not None:
            self.pruner.average_over_ranks()

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: float, teacher_logits: Tensor | None = None
    ) -> StepResult:
        """Make a step.

        Args:
            images: (B, C, H, W).
            labels: int64 (B,).
            epoch: of the step; a step within an epoch is a fraction.
            teacher_logits: a teacher's logits (B, classes) on the images.
        """
        progress = epoch / self.config.epochs
        lr = learning_rate(self.config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if self._immediate:
            self.guard.buffers.keep()
        if self._before is not None:
            self._before.keep()
        computed = self._forward_backward(images, labels, progress, teacher_logits)
        if not self.skipping.verified(len(images)) and self._before is not None:
            self._before.restore()
            computed = self._forward_backward(images, labels, progress, teacher_logits)
            self.skipping.verified(len(images))
        result = self._update(computed)
        self.observe(result, labels)
        self._after_step(progress)
        return result

    def finish(self) -> None:
        """End the run: averaged weights take the place of the last ones."""
        if self.lookahead is not None:
            self.lookahead.finish()

    def _after_step(self, progress: float) -> None:
        """Lookahead and pruning: they read values on the host and change weights without a gradient."""
        if self.lookahead is not None:
            self.lookahead.step(progress)
        if self.pruner is not None and progress >= self.config.mac_ramp[0]:
            self.pruner.step(mac_share_at(self.config, progress))

    def _forward_backward(
        self, images: Tensor, labels: Tensor, progress: float, teacher_logits: Tensor | None
    ) -> StepResult:
        count = self.config.accumulate
        # DistributedDataParallel weighs ranks equally; one may have an image more than another.
        weight = len(images) * self.ranks.world / self.config.batch_size
        logits_of_parts, loss, polarization, rates = [], torch.zeros((), device=self.device), None, None
        teacher_parts = [None] * count if teacher_logits is None else teacher_logits.tensor_split(count)
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(images.tensor_split(count), labels.tensor_split(count), teacher_parts, strict=True)
        for index, (x, y, teacher_part) in enumerate(parts):
            wait = self.ranks.world > 1 and index < count - 1
            with self.network.no_sync() if wait else nullcontext():  # type: ignore[operator]
                with self.autocast:
                    logits = self.network(x)
                self.skipping.note_forward(len(x), first=index == 0)
                task, share = task_loss(logits, y, self.config.label_smoothing), len(x) / len(images)
                if teacher_part is not None:
                    task = distillation_loss(task, logits, teacher_part, self.config)
                total = task if share * weight == 1 else task * (share * weight)
                loss += task.detach() * share
                if self._gates:
                    of_gates, polar = gate_loss(self.model, self.config, self._loss_weights(progress), self.controller)
                    total = total + of_gates
                    loss += of_gates.detach() / count
                    polarization = polar.detach() / count + (0 if polarization is None else polarization)
                self.scaler.scale(total).backward()
            rates = self._add_rates(rates, share)
            # A CUDA graph of the network writes the next part's logits to the same memory.
            logits_of_parts.append(logits.detach().clone() if count > 1 else logits.detach())
        return StepResult(logits_of_parts[0] if count == 1 else torch.cat(logits_of_parts), loss, polarization, rates)

    def _add_rates(self, rates: Tensor | None, share: float) -> Tensor | None:
        """Add the open rates of a part, a share of the batch."""
        seen = [gate.open_rate.detach() for gate in self._gates if gate.open_rate is not None]
        if not seen:
            return rates
        part = torch.cat(seen)
        return part if share == 1 else part * share + (0 if rates is None else rates)

    def _loss_weights(self, progress: float) -> GateWeights:
        return gate_weights(self.config, progress)

    def _update(self, computed: StepResult) -> StepResult:
        """Change the weights, unless the loss or the gradient is not finite."""
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.config.grad_clip:
            clip_grads_with_norm_(self._parameters, self.config.grad_clip, norm)
        bad = ~self._finite(computed.loss, norm)
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by the fused kernel
            self.optimizer.step()
        if self._immediate and bool(bad):
            self.guard.buffers.restore()
        self.guard.count(bad)
        return computed._replace(bad=bad)

    def _finite(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Bool (), the same on every rank: whether the loss, of all ranks, and the norm of the gradient are finite."""
        finite = norm.isfinite()
        if not self.scaler.is_enabled():  # a rank's loss is part of the gradient of all
            return finite if self.ranks.world > 1 else finite & loss.isfinite()
        # A scaled gradient may overflow: the scaler then lowers the scale. An unscaled one that does is broken.
        overflowed = self.scaler.scale(torch.ones((), device=self.device)) > 1
        broken = self.ranks.sum(loss.isfinite().logical_not().int())
        return (finite | overflowed) & (broken == 0)


def _compiled(model: nn.Module, compile: bool) -> nn.Module:
    """The network, compiled into a single graph if configured."""
    if not compile:
        return model
    compiled: nn.Module = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
    return compiled


# ---- bad steps


def checks_immediately(device: torch.device) -> bool:
    """Whether each step is checked before the next one, for which a GPU's host would have to wait."""
    return device.type == "cpu"


class Buffers:
    """A copy of a network's buffers (running statistics), to restore them from."""

    def __init__(self, model: nn.Module) -> None:
        self._live = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the present values."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def restore(self, *, only_broken: bool = False) -> None:
        """Restore the copied values; with ``only_broken`` those of buffers that are no longer finite."""
        for live, kept in zip(self._live, self._kept, strict=True):
            if not only_broken or (live.is_floating_point() and not bool(live.isfinite().all())):
                live.copy_(kept)


class StepGuard:
    """Keeps steps without a finite loss and gradient out of the weights, and counts them.

    On the CPU each step is checked immediately. On a GPU the optimizer's kernel leaves the weights unchanged, so that
    the host need not wait, and `repair`, called now and then, restores the running statistics.

    Attributes:
        skipped: int64 (), bad steps of this epoch.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.buffers = Buffers(model)
        self.skipped, self._row, self._longest = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))
        self._repaired = 0  # bad steps of this epoch up to the last repair

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "row": self._row, "longest": self._longest}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from counts; KeyError where one is missing."""
        for name, count in self.state_dict().items():
            count.copy_(state[name])
        self._repaired = int(self.skipped)

    def new_epoch(self) -> None:
        """Count from 0 again."""
        self.skipped.zero_()
        self._longest.copy_(self._row)
        self._repaired = 0

    def count(self, bad: Tensor) -> None:
        """Count a step, bool (): whether it was bad."""
        self.skipped += bad
        self._row.add_(1).mul_(bad)
        torch.maximum(self._longest, self._row, out=self._longest)

    def repair(self) -> str:
        """Restore running statistics that bad steps broke; returns why to end the run, or "". Waits for the device."""
        skipped, longest = int(self.skipped), int(self._longest)
        if skipped > self._repaired:
            self.buffers.restore(only_broken=True)
        self.buffers.keep()
        self._repaired = skipped
        if longest > MOST_IN_A_ROW:
            return f"{longest} steps in a row"
        if skipped > MOST_IN_AN_EPOCH:
            return f"{skipped} steps of an epoch"
        return ""
