"""The training loop: epochs of steps, an evaluation and a checkpoint after each; stop requests and time limits.

Read `Training.epochs` from top to bottom; everything else is what one of its lines calls.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.data import ImageData
from gatedconv.measure.macs import count_macs
from gatedconv.train.callbacks import StepReport
from gatedconv.train.checkpoint import State, load_checkpoint, pack_state, restore_state, save_checkpoint
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.cuda_graph_step import make_stepper
from gatedconv.train.device import place
from gatedconv.train.distill import FinishedTeacher, Teacher, make_teacher
from gatedconv.train.distributed import current
from gatedconv.train.epoch_cost import EpochCost
from gatedconv.train.metrics import EpochMeter, EpochMetrics, evaluate
from gatedconv.train.optimizer import learning_rate
from gatedconv.train.recipe import eval_batches, polar_weight, train_batches
from gatedconv.train.skip_dead import PASSES_PER_STEP, StepMacs
from gatedconv.train.step import Stepper, StepResult, checks_immediately
from gatedconv.train.stopping import StopPoll

# Reading the loss makes the host wait for a GPU; once in this many steps costs nothing measurable.
_SYNC_EVERY = 20


class NonFiniteLoss(ArithmeticError):
    """Too many steps had a loss or gradient that is not finite; the message is for the user."""


class Training:
    """One phase of training.

    Where torch.distributed is initialized, every process makes one and all train one network: each on its share of
    every batch, with the losses on the gates over all of it. The main process alone writes.

    Args:
        model: any classifier; if it has gates, the losses of `config` act on them.
        data: images and labels.
        config: the recipe.
        phase: the name of this training in metrics and errors.
        checkpoint: file written after each epoch, and within one as `checkpoint_minutes` sets; None writes none.
        on_step: called now and then within an epoch.
        on_note: called with messages for the user: that the previous checkpoint was read, that steps were skipped.
        deadline: `time.monotonic()` after which to stop; at least one step is made, so that a run that is resumed
            often enough completes.
        stop: called after each step, with several processes about once a second, and between epochs; True from any
            process ends `epochs` after a checkpoint.
        teacher: of an earlier phase; None for a new one, if `config` names its network.

    Attributes:
        history: metrics of the epochs done.
        replayed: how many of them were read from the checkpoint.

    Raises:
        ValueError: the batch size or `pad` does not fit the data, or the device does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        config: TrainConfig,
        *,
        phase: str = "gated",
        checkpoint: Path | None = None,
        on_step: Callable[[StepReport], object] | None = None,
        on_note: Callable[[str], object] = warnings.warn,
        deadline: float | None = None,
        stop: Callable[[], bool] | None = None,
        teacher: Teacher | FinishedTeacher | None = None,
    ) -> None:
        ranks = self.ranks = current()
        self.batches = train_batches(config, data, phase, ranks)
        self.test_batches = eval_batches(config, data, ranks=ranks)
        self.model, self.config, self.phase, self.checkpoint = place(model, config), config, phase, checkpoint
        self.device = self.batches.labels.device
        self.teacher = teacher or make_teacher(config, data, phase, ranks)
        self.on_step, self.on_note = on_step or (lambda report: None), on_note
        self.stop, self.deadline = stop or (lambda: False), deadline
        share = self.batches.share
        self.weight = (share.stop - share.start) * ranks.world / config.batch_size  # ranks differ by an image
        self.history: list[EpochMetrics] = []
        self.replayed = 0
        self.meter = EpochMeter(model, self.device)
        self.cost = EpochCost(self._counters, ranks, self.device, shared=config.shared_device)
        self.poll = StopPoll(ranks, self.device)
        self._written = time.monotonic()

    def epochs(self, resume: bool) -> Iterator[EpochMetrics]:
        """Train epoch by epoch.

        Args:
            resume: continue from the checkpoint; the epochs already done are yielded again, from the file.

        Yields:
            The metrics of each epoch, after its checkpoint is on the disk.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or of another run.
            NonFiniteLoss: more than a few steps were not finite; the last checkpoint is from before.
            OSError: the checkpoint could not be written; the previous one is kept.
        """
        torch.manual_seed((self.config.seed + 7919 * self.ranks.rank) % 2**63)  # the gates' own noise
        self.stepper = make_stepper(
            self.model, self.config, self.device, self.ranks, macs_per_image=self._compact_macs(), observe=self._observe
        )
        if self.teacher is not None:
            self.teacher.begin(self.stepper)
        if resume:
            self._restore()
            yield from self.history
        first, end = epoch_range(self.config, self.phase)
        remaining = range(first + len(self.history), end)
        for epoch in remaining:
            if self.ranks.any(self.stop() or (epoch > remaining.start and self._deadline_passed())):
                return
            if not self._steps(epoch):
                return
            metrics = self._evaluated(epoch)
            self.history.append(metrics)
            self.batches.position = 0
            self._save()
            yield metrics

    def _steps(self, epoch: int) -> bool:
        """Make the steps of an epoch that are left; False if the run is to stop before its end."""
        self._written = time.monotonic()
        self.cost.start()
        self.model.train()
        steps = len(self.batches)
        with self.stepper.active():
            for images, labels in self.batches:
                step = self.batches.position or steps
                now = epoch + (step - 1) / steps
                teacher_logits = None if self.teacher is None else self.teacher(images, labels, now)
                self.stepper(images, labels, now, teacher_logits)
                now_and_then = step % _SYNC_EVERY == 0 or step == steps
                if now_and_then:
                    self.cost.poll()
                if checks_immediately(self.device) or now_and_then:
                    self.on_step(self._checked(epoch))
                if self.poll.due() and step < steps and not self._continues(epoch):
                    return False
            if self.stepper.pruner is not None and epoch + 1 == epoch_range(self.config, self.phase)[1]:
                self.stepper.pruner.finish(self.config.mac_target)
        if epoch + 1 == self.config.epochs:
            for stepper in self._steppers():
                stepper.finish()
        return True

    def _observe(self, result: StepResult, labels: Tensor) -> None:
        logits, loss, polarization, open_rates, bad = result
        self.meter.add(logits, labels, loss, polarization, open_rates, bad, self.weight)

    def _compact_macs(self) -> float:
        """MACs of an image of a compact network, which carries no ``mac_terms``; 0 for others."""
        is_compact = self.phase == "compact" or bool(self.config.subnetwork)
        return float(count_macs(self.model, self.test_batches.first(1))) if is_compact else 0.0

    def _continues(self, epoch: int) -> bool:
        """Write a checkpoint within the epoch if one is due; False if the run is to stop."""
        every = 60 * self.config.checkpoint_minutes
        due = self.ranks.main and bool(every) and time.monotonic() - self._written >= every
        stop, save = self.poll.any(self.stop() or self._deadline_passed(), due)
        if stop or save:
            self._checked(epoch)  # what a bad step has broken must not be saved
            self._save()
            self._written = time.monotonic()
        return not stop

    def _checked(self, epoch: int) -> StepReport:
        """Progress of the epoch, after repairs; NonFiniteLoss after too many bad steps."""
        steps = len(self.batches)
        step = self.batches.position or steps
        report = StepReport(self.phase, epoch + 1, step, steps, self.meter.mean_loss, self.meter.top1)
        for stepper in self._steppers():
            self._require_finite(stepper.guard.repair(), report)
        return report

    def _steppers(self) -> list[Stepper]:
        """The steppers at work: the network's and, once it exists, the teacher's."""
        teacher = None if self.teacher is None else self.teacher.stepper
        return [self.stepper] if teacher is None else [self.stepper, teacher]

    def _counters(self) -> list[StepMacs]:
        """The MAC counters of the steppers and of a finished teacher."""
        counters = [stepper.macs for stepper in self._steppers()]
        return [*counters, self.teacher.macs] if isinstance(self.teacher, FinishedTeacher) else counters

    def _evaluated(self, epoch: int) -> EpochMetrics:
        """The metrics of an epoch whose steps are done; resets the counts for the next one."""
        config, steps = self.config, len(self.batches)
        self.ranks.average_buffers(self.model, self.weight)
        self.meter.load_state_dict(self.meter.total(self.ranks))
        of_gates = self.meter.gate_metrics(self.ranks)  # before the evaluation, whose batches the gates see, too
        with self.stepper.autocast:  # only the finished network is evaluated in its own precision
            test_loss, test_top1 = evaluate(self.model, self.test_batches, self.ranks)
        report = StepReport(self.phase, epoch + 1, steps, steps, self.meter.mean_loss, self.meter.top1)
        self._require_finite("" if math.isfinite(report.loss) else "every step", report)
        self._require_finite("" if math.isfinite(test_loss) else "the evaluation", report)
        cost = self.cost.state_dict()
        executed, saved = cost.pop("executed"), cost.pop("saved")
        done = epoch + (steps - 1) / steps
        metrics = EpochMetrics(
            phase=self.phase,
            epoch=epoch + 1,
            lr=learning_rate(config, done),
            train_loss=report.loss,
            train_top1=report.top1,
            test_loss=test_loss,
            test_top1=test_top1,
            polar_weight=polar_weight(config, done / config.epochs),
            steps_skipped=int(self.stepper.guard.skipped),
            **cost,
            **self._macs(executed, saved),
            **of_gates,
        )
        if metrics.steps_skipped:
            self.on_note(
                f"{self.phase}: epoch {epoch + 1}: {metrics.steps_skipped} of {steps} steps had a loss or "
                "gradient that is not finite and were skipped"
            )
        self._new_epoch()
        return metrics

    def _new_epoch(self) -> None:
        self.meter.new_epoch()
        for stepper in self._steppers():
            stepper.guard.new_epoch()
        self.cost.new_epoch()

    def _macs(self, executed: float, saved: float) -> dict[str, Any]:
        """MACs that the epoch's steps executed, and the share that was skipped; empty where they are unknown."""
        full = PASSES_PER_STEP * self.stepper.macs.per_image * len(self.batches) * self.config.batch_size
        return {"train_macs": executed, "macs_saved": saved / full} if full else {}

    def _parts(self) -> dict[str, Any]:
        """The parts with a state, by name."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return self.stepper.parts | {"guard": self.stepper.guard} | teacher

    def _save(self) -> None:
        """Write a checkpoint, at the end of an epoch or within one; a collective."""
        if self.checkpoint is None:
            return
        self.stepper.average(self.weight)
        if self.teacher is not None:
            self.teacher.average(self.weight)
        state = pack_state(self._parts(), self.batches, self.config, self.phase, self.history, self.ranks)
        if self.batches.position:
            state["within"] = {**self.cost.state_dict(), "meter": self.meter.total(self.ranks)}
        if self.ranks.main:
            save_checkpoint(self.checkpoint, state)

    def _restore(self) -> None:
        assert self.checkpoint is not None
        path = self.checkpoint
        state: State = self.ranks.agree(load_checkpoint(path, self.on_note) if self.ranks.main else {})
        self.history = restore_state(state, path, self._parts(), self.batches, self.config, self.phase, self.ranks)
        self.replayed = len(self.history)
        self.stepper.guard.buffers.keep()
        within = state.get("within")
        if within:
            self.cost.load_state_dict(within)
            if self.ranks.main:  # the sums are those of all ranks
                self.meter.load_state_dict(within["meter"])

    def _deadline_passed(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _require_finite(self, too_many: str, at: StepReport) -> None:
        if not too_many:
            return
        path = self.checkpoint
        kept = f"; the last good checkpoint is kept at {path}" if path is not None and path.exists() else ""
        raise NonFiniteLoss(
            f"{at.phase}: loss or gradient not finite in {too_many}, last in epoch {at.epoch}, "
            f"step {at.step} of {at.steps} (a lower lr or grad_clip may help){kept}"
        )
