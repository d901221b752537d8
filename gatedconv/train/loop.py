"""The training loop: epochs of steps, an evaluation and a checkpoint after each, and where they stand in between.

Read `_Training.epochs` from top to bottom; everything else is what one of its lines calls.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.data import EvalBatches, ImageData, TrainBatches
from gatedconv.measure.energy import EnergyMeter
from gatedconv.measure.macs import count_macs
from gatedconv.train.captured import make_forward, make_stepper
from gatedconv.train.checkpoint import State, load_checkpoint, save_checkpoint
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.distributed import Ranks, current
from gatedconv.train.energy import Energy, continued, joined, spent
from gatedconv.train.guard import judged_at_once
from gatedconv.train.metrics import EpochMeter, EpochMetrics, evaluate
from gatedconv.train.questions import Questions
from gatedconv.train.recipe import learning_rate, place, placement, polar_weight, train_batches
from gatedconv.train.state import pack_state, restore_part, restore_state
from gatedconv.train.step import Stepper, StepResult
from gatedconv.train.step_macs import PASSES_PER_STEP
from gatedconv.train.teacher import Teacher, teacher_of

# Reading the loss makes the host wait for a GPU; once in this many steps costs nothing measurable.
_SYNC_EVERY = 20


class NonFiniteLoss(ArithmeticError):
    """Too many steps had a loss or gradient that is not finite; the message is for the user."""


@dataclass(frozen=True)
class StepReport:
    """Where a run stands within an epoch: means so far, and what the gates do now."""

    phase: str
    epoch: int
    step: int
    steps: int
    loss: float
    top1: float


StepListener = Callable[[StepReport], None]


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    *,
    phase: str = "gated",
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: StepListener | None = None,
    on_note: Callable[[str], object] = warnings.warn,
    deadline: float | None = None,
    stop: Callable[[], bool] | None = None,
    teacher: Teacher | None = None,
) -> Iterator[EpochMetrics]:
    """Train a network in place, an epoch for every item taken from the iterator.

    Where torch.distributed is initialised, every process calls this and all train one network: each on its
    share of every batch, with the losses on the gates over the whole of it. The first process alone writes.

    Args:
        model: any classifier; if it has gates, the losses of `config` act on them.
        data: images and labels.
        config: the recipe.
        phase: the name of this training in metrics and errors.
        checkpoint: file written after each epoch, and within one as `checkpoint_minutes` asks; None writes none.
        resume: go on from `checkpoint`; the epochs already done are yielded again, unchanged, from the file.
        on_step: called now and then within an epoch.
        on_note: called with what a person should know: that an older checkpoint had to stand in, or that steps
            were skipped.
        deadline: `time.monotonic()` after which to stop as if asked to; a step is made first, however late it is,
            so that a run that is resumed often enough comes to its end.
        stop: asked after each step, with several processes about once a second, and between epochs; True from any
            process ends the iterator after a checkpoint.
        teacher: goes on teaching; None for a new one, if `config` asks for it: of the network that `config` names.

    Yields:
        The metrics of each epoch, after its checkpoint is on the disk.

    Raises:
        ValueError: the batch size or `pad` does not fit the data, or no such device.
        CheckpointError: the checkpoint is missing, damaged or of another run.
        NonFiniteLoss: more than a few steps were not finite; the last checkpoint is from before.
        OSError: the checkpoint could not be written; the one before is kept.
    """
    ranks = current()
    batches = train_batches(config, data, phase, ranks)
    test_batches = EvalBatches(data, **placement(config), rank=ranks.rank, world=ranks.world)
    place(model, config)
    listeners = _Listeners(on_step or (lambda report: None), on_note, stop or (lambda: False))
    teacher = teacher or teacher_of(config, data, phase, ranks)
    training = _Training(model, batches, test_batches, config, phase, checkpoint, ranks, listeners, deadline, teacher)
    return training.epochs(resume and checkpoint is not None)


@dataclass(frozen=True)
class _Listeners:
    step: StepListener
    note: Callable[[str], object]
    stop: Callable[[], bool]


# Of an epoch: seconds, multiply-accumulates executed and left out.
_NOTHING = {"seconds": 0.0, "executed": 0.0, "saved": 0.0}


class _Training:
    """One training, and where it stands within an epoch."""

    def __init__(
        self,
        model: nn.Module,
        batches: TrainBatches,
        test_batches: EvalBatches,
        config: TrainConfig,
        phase: str,
        checkpoint: Path | None,
        ranks: Ranks,
        listeners: _Listeners,
        deadline: float | None,
        teacher: Teacher | None,
    ) -> None:
        self.teacher = teacher
        self.model, self.batches, self.test_batches = model, batches, test_batches
        self.config, self.phase, self.checkpoint = config, phase, checkpoint
        self.ranks, self.listeners, self.deadline = ranks, listeners, deadline
        self.device = batches.labels.device
        share = batches.share
        self.weight = (share.stop - share.start) * ranks.world / config.batch_size  # ranks differ by an image
        self.history: list[EpochMetrics] = []
        self.meter = EpochMeter(model, self.device)
        self.forward = make_forward(model, config, listeners.note)
        self.energy = EnergyMeter(self.device, host=ranks.local == 0, shared=config.shared_device)
        self.questions = Questions(ranks, self.device)
        self._earlier, self._energy_before = dict(_NOTHING), Energy()  # of this epoch, before a restart
        self._started = self._written = time.monotonic()

    def epochs(self, resume: bool) -> Iterator[EpochMetrics]:
        torch.manual_seed((self.config.seed + 7919 * self.ranks.rank) % 2**63)  # the gates' own noise
        # What is left of a network after a cut carries no costs of its pieces.
        is_cut = self.phase == "cut" or bool(self.config.subnetwork)
        cut = float(count_macs(self.model, self.test_batches.first(1))) if is_cut else 0.0
        self.stepper = make_stepper(
            self.model, self.config, self.device, self.ranks, macs_per_image=cut, observe=self._observe
        )
        if self.teacher is not None:
            self.teacher.begin(self.stepper)
        if resume:
            self._restore()
            yield from self.history
        first, end = epoch_range(self.config, self.phase)
        todo = range(first + len(self.history), end)
        for epoch in todo:
            if self.ranks.any(self.listeners.stop() or (epoch > todo.start and self._late())):
                return
            if not self._steps(epoch):
                return
            metrics = self._evaluated(epoch)
            self.history.append(metrics)
            self.batches.position = 0
            self._save()
            yield metrics

    def _steps(self, epoch: int) -> bool:
        """Make the steps of an epoch, or those that are left of it; False if the run is to stop before its end."""
        self._started = self._written = time.monotonic()
        self.energy.start()
        self.model.train()
        steps = len(self.batches)
        with self.stepper.active():
            for images, labels in self.batches:
                step = self.batches.position or steps
                now = epoch + (step - 1) / steps
                taught = None if self.teacher is None else self.teacher(images, labels, now)
                self.stepper(images, labels, now, taught)
                now_and_then = step % _SYNC_EVERY == 0 or step == steps
                if now_and_then:
                    self.energy.poll()
                if judged_at_once(self.device) or now_and_then:
                    self.listeners.step(self._settled(epoch))
                if self.questions.due() and step < steps and not self._go_on(epoch):
                    return False
        return True

    def _observe(self, result: StepResult, labels: Tensor) -> None:
        self.meter.add(result.logits, labels, result.loss, result.polarization, result.bad, self.weight)

    def _go_on(self, epoch: int) -> bool:
        """Write a checkpoint within the epoch if one is due; False if the run is to stop."""
        every = 60 * self.config.checkpoint_minutes
        due = self.ranks.main and bool(every) and time.monotonic() - self._written >= every
        stop, save = self.questions.ask(self.listeners.stop() or self._late(), due)
        if stop or save:
            self._settled(epoch)  # what a bad step has broken goes into no checkpoint
            self._save()
            self._written = time.monotonic()
        return not stop

    def _settled(self, epoch: int) -> StepReport:
        """Where the epoch stands, what bad steps left behind repaired; NonFiniteLoss where they are too many."""
        steps = len(self.batches)
        step = self.batches.position or steps
        report = StepReport(self.phase, epoch + 1, step, steps, self.meter.mean_loss, self.meter.top1)
        for stepper in self._steppers():
            self._require_finite(stepper.guard.settle(), report)
        return report

    def _steppers(self) -> list[Stepper]:
        """Of the network, and of the one that teaches it, if there is one by now."""
        beside = None if self.teacher is None else self.teacher.stepper
        return [self.stepper] if beside is None else [self.stepper, beside]

    def _parts(self) -> dict[str, Any]:
        """What has a state, by name."""
        return self.stepper.parts | ({} if self.teacher is None else {"teacher": self.teacher})

    def _evaluated(self, epoch: int) -> EpochMetrics:
        """The metrics of an epoch whose steps are done; begins to count the next one."""
        config, steps = self.config, len(self.batches)
        self.ranks.average_buffers(self.model, self.weight)
        self.meter.load_state_dict(self.meter.joined(self.ranks))
        of_gates = self.meter.gate_metrics(self.ranks)  # before the evaluation, whose batches the gates would tell of
        test_loss, test_top1 = evaluate(self.model, self.test_batches, self.ranks, self.forward)
        report = StepReport(self.phase, epoch + 1, steps, steps, self.meter.mean_loss, self.meter.top1)
        self._require_finite(None if math.isfinite(report.loss) else "every step", report)
        self._require_finite(None if math.isfinite(test_loss) else "the evaluation", report)
        within, energy = self._within(), self._all_energy()
        done = epoch + (steps - 1) / steps
        metrics = EpochMetrics(
            phase=self.phase,
            epoch=epoch + 1,
            lr=learning_rate(config, done),
            train_loss=report.loss,
            train_top1=report.top1,
            test_loss=test_loss,
            test_top1=test_top1,
            seconds=within["seconds"],
            polar_weight=polar_weight(config, done / config.epochs),
            steps_skipped=int(self.stepper.guard.skipped),
            energy_j=energy.joules,
            energy_reason=energy.reason,
            energy_source=energy.source,
            **self._macs(self._sum(within["executed"]), self._sum(within["saved"])),
            **of_gates,
        )
        if metrics.steps_skipped:
            self.listeners.note(
                f"{self.phase}: epoch {epoch + 1}: {metrics.steps_skipped} of {steps} steps had a loss or gradient "
                "that is not finite and were skipped"
            )
        self._new_epoch()
        return metrics

    def _new_epoch(self) -> None:
        self.meter.new_epoch()
        for stepper in self._steppers():
            stepper.guard.new_epoch()
            stepper.macs.new_epoch()
        self._earlier, self._energy_before = dict(_NOTHING), Energy()

    def _macs(self, executed: float, saved: float) -> dict[str, Any]:
        """MACs that the epoch's steps executed, and the share that was left out; 0 where they are unknown."""
        whole = PASSES_PER_STEP * self.stepper.macs.per_image * len(self.batches) * self.config.batch_size
        return {"train_macs": executed, "macs_saved": saved / whole} if whole else {}

    def _sum(self, value: float) -> float:
        return float(self.ranks.sum(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def _all_energy(self) -> Energy:
        """The energy of the epoch so far, of all processes; a collective."""
        return continued(self._energy_before, joined(self.ranks.gather(spent(self.energy))))

    def _within(self) -> dict[str, Any]:
        """Time and MACs of the epoch so far, what passed before a restart included."""
        return {
            "seconds": self._earlier["seconds"] + time.monotonic() - self._started,
            "executed": self._earlier["executed"] + sum(stepper.macs.executed for stepper in self._steppers()),
            "saved": self._earlier["saved"] + self.stepper.macs.saved,
        }

    def _save(self) -> None:
        """Write a checkpoint, of the end of an epoch or of the middle of one; a collective."""
        if self.checkpoint is None:
            return
        self.stepper.join(self.weight)
        if self.teacher is not None:
            self.teacher.join(self.weight)
        state = pack_state(self._parts(), self.batches, self.config, self.phase, self.history, self.ranks)
        state["guard"] = self.stepper.guard.state_dict()
        if self.batches.position:
            within, energy = self._within(), self._all_energy()
            within |= {"energy_j": energy.joules, "energy_reason": energy.reason, "energy_source": energy.source}
            within |= {name: self._sum(within[name]) for name in ("executed", "saved")}
            state["within"] = {**within, "meter": self.meter.joined(self.ranks)}
        if self.ranks.main:
            save_checkpoint(self.checkpoint, state)

    def _restore(self) -> None:
        assert self.checkpoint is not None
        path = self.checkpoint
        state: State = self.ranks.agree(load_checkpoint(path, self.listeners.note) if self.ranks.main else {})
        self.history = restore_state(state, path, self._parts(), self.batches, self.config, self.phase, self.ranks)
        self.stepper.guard.buffers.keep()
        if "guard" in state:
            restore_part(state, path, "guard", self.stepper.guard)
        within = state.get("within")
        if within:
            self._earlier["seconds"] = within["seconds"]
            told = [str(within.get(name, "")) for name in ("energy_reason", "energy_source")]
            self._energy_before = Energy(within["energy_j"], *told)
            if self.ranks.main:  # which holds what all of them had seen
                self._earlier |= {name: within.get(name, 0.0) for name in ("executed", "saved")}
                self.meter.load_state_dict(within["meter"])

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _require_finite(self, too_many: str | None, at: StepReport) -> None:
        if too_many is None:
            return
        path = self.checkpoint
        kept = f"; the last good checkpoint is kept at {path}" if path is not None and path.exists() else ""
        raise NonFiniteLoss(
            f"{at.phase}: loss or gradient not finite in {too_many}, last in epoch {at.epoch}, step {at.step} of "
            f"{at.steps} (a lower lr or grad_clip may help){kept}"
        )
