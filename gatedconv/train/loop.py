"""The training loop: batches made on the device, SGD, the losses on the gates, a checkpoint per epoch.

Read `_epochs` from top to bottom; everything else is what one of its lines calls.
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
from torch.nn import functional

from gatedconv.data import Augment, EvalBatches, ImageData, TrainBatches
from gatedconv.gates import MacController, activation_loss, find_gates, mac_target_loss, polarization_loss, schedules
from gatedconv.train.checkpoint import load_checkpoint, save_checkpoint
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.metrics import EpochMeter, EpochMetrics, evaluate
from gatedconv.train.state import pack_state, restore_state

# On a GPU, reading the loss makes the host wait; once in this many steps costs nothing measurable.
_SYNC_EVERY = 20


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message is for the user."""


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
) -> Iterator[EpochMetrics]:
    """Train a network in place, an epoch for every item taken from the iterator.

    Args:
        model: any classifier; if it has gates, the losses of `config` act on them.
        data: images and labels.
        config: the recipe.
        phase: the name of this training in metrics and errors.
        checkpoint: file written after each epoch; None writes none.
        resume: go on from `checkpoint`; the epochs already done are yielded again, unchanged, from the file.
        on_step: called now and then within an epoch.
        on_note: called with what a person should know: that an older checkpoint had to stand in.
        deadline: `time.monotonic()` by which to stop; an epoch that would end after it is not begun.

    Yields:
        The metrics of each epoch, after its checkpoint is on the disk.

    Raises:
        ValueError: the batch size or `pad` does not fit the data, or no such device.
        CheckpointError: the checkpoint is missing, damaged or of another run.
        NonFiniteLoss: the loss became NaN or infinite; the last checkpoint is from before.
        OSError: the checkpoint could not be written; the one before is kept.
    """
    batches = train_batches(config, data, phase)
    test_batches = EvalBatches(data, **placement(config))
    place(model, config)
    return _epochs(
        model,
        batches,
        test_batches,
        config,
        phase,
        checkpoint,
        resume and checkpoint is not None,
        on_step,
        on_note,
        deadline,
    )


def train_batches(config: TrainConfig, data: ImageData, phase: str = "gated") -> TrainBatches:
    """The batches that a run trains on; a training that does not begin with the run draws others than its first.

    Raises:
        ValueError: the batch size or `pad` does not fit the data, or no such device.
    """
    return TrainBatches(
        data,
        config.batch_size,
        augment=augmentation(data, config),
        seed=(config.seed + (epoch_range(config, phase)[0] << 32)) % 2**63,
        **placement(config),
    )


def placement(config: TrainConfig) -> dict[str, Any]:
    """Where batches are made and in which layout, as arguments of `TrainBatches` and `EvalBatches`."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return {"device": resolve_device(config.device), "memory_format": layout}


def place(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Move a network to where the batches of a run are, in their layout; returns it."""
    moved: nn.Module = model.to(resolve_device(config.device)).to(memory_format=placement(config)["memory_format"])
    return moved


def _epochs(
    model: nn.Module,
    batches: TrainBatches,
    test_batches: EvalBatches,
    config: TrainConfig,
    phase: str,
    checkpoint: Path | None,
    resume: bool,
    on_step: StepListener | None,
    on_note: Callable[[str], object],
    deadline: float | None,
) -> Iterator[EpochMetrics]:
    device = batches.labels.device
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    autocast = torch.autocast(
        device.type, torch.bfloat16 if config.amp == "bf16" else torch.float16, enabled=config.amp != "off"
    )
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    controller = make_controller(model, config)
    if controller is not None:
        parts["controller"] = controller.to(device)
    torch.manual_seed(config.seed)  # the gates' own noise; order and augmentation have their generator

    history: list[EpochMetrics] = []
    if resume and checkpoint is not None:
        history = restore_state(load_checkpoint(checkpoint, on_note), checkpoint, parts, batches, config, phase)
        yield from history

    steps = len(batches)
    first, end = epoch_range(config, phase)
    for epoch in range(first + len(history), end):
        if deadline is not None and _would_miss(deadline, history):
            return
        started = time.monotonic()
        model.train()
        meter = EpochMeter(model)
        for step, (images, labels) in enumerate(batches):
            done = epoch + step / steps
            set_learning_rate(optimizer, learning_rate(config, done))
            with autocast:
                logits = model(images)
            loss, polarization = total_loss(model, logits, labels, config, done / config.epochs, controller)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if config.grad_clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            meter.add(logits, labels, loss, polarization)
            if device.type == "cpu" or (step + 1) % _SYNC_EVERY == 0:
                report = StepReport(phase, epoch + 1, step + 1, steps, meter.mean_loss, meter.top1)
                _require_finite(report.loss, "loss", report, checkpoint)
                if on_step is not None:
                    on_step(report)

        of_gates = meter.gate_metrics()  # before the evaluation, whose batches the gates would tell of
        test_loss, test_top1 = evaluate(model, test_batches)
        report = StepReport(phase, epoch + 1, steps, steps, meter.mean_loss, meter.top1)
        _require_finite(report.loss, "loss", report, checkpoint)
        _require_finite(test_loss, "test loss", report, checkpoint)
        metrics = EpochMetrics(
            phase=phase,
            epoch=epoch + 1,
            lr=learning_rate(config, done),
            train_loss=report.loss,
            train_top1=report.top1,
            test_loss=test_loss,
            test_top1=test_top1,
            seconds=time.monotonic() - started,
            polar_weight=polar_weight(config, done / config.epochs),
            **of_gates,
        )
        history.append(metrics)
        if checkpoint is not None:
            save_checkpoint(checkpoint, pack_state(parts, batches, config, phase, history))
        yield metrics


def total_loss(
    model: nn.Module,
    logits: Tensor,
    labels: Tensor,
    config: TrainConfig,
    progress: float,
    controller: MacController | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy plus what `config` asks of the gates (eqs. 5, 9 and the MAC target).

    Args:
        model: the network that has just made `logits`; its gates hold this batch's open rates.
        logits: (B, classes).
        labels: int64 (B,).
        config: weights and schedules.
        progress: share of the run that is done, in [0, 1].
        controller: of `make_controller`, for a run that has one.

    Returns:
        The whole loss, and the polarization part before its weight; None for a network without gates.
    """
    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    if not find_gates(model):
        return loss, None
    polarization = polarization_loss(model)
    weight = polar_weight(config, progress)
    if weight:
        loss = loss + weight * polarization
    ramp = schedules.linear_warmup(progress, 1.0, config.gate_warmup)
    if config.act_weight:
        loss = loss + ramp * config.act_weight * activation_loss(model, weight=config.act_weighting)
    if config.mac_weight:
        loss = loss + ramp * config.mac_weight * mac_target_loss(model, target=config.mac_target)
    if controller is not None and progress >= config.mac_ramp[0]:
        loss = loss + controller(model, schedules.falling(progress, config.mac_target, *config.mac_ramp))
    return loss, polarization


def make_controller(model: nn.Module, config: TrainConfig) -> MacController | None:
    """The controller of the MACs, if `config` asks for one and the network has gates to move."""
    return MacController(config.mac_gain) if config.mac_gain and find_gates(model) else None


def polar_weight(config: TrainConfig, progress: float) -> float:
    """λ of the polarization loss at a progress in [0, 1]."""
    if config.polar_schedule == "rising":
        return schedules.rising(progress, config.polar_weight)
    if config.polar_schedule == "warmup":
        return schedules.linear_warmup(progress, config.polar_weight, config.gate_warmup)
    return schedules.constant(progress, config.polar_weight)


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The learning rate after `epoch` epochs (a step within an epoch is a fraction of one)."""
    if epoch < config.warmup_epochs:
        # Never exactly 0: the first step would do nothing.
        return config.lr * max(epoch, 0.01) / config.warmup_epochs
    if config.schedule == "staged":
        passed = sum(epoch / config.epochs >= milestone for milestone in config.milestones)
        return config.lr * config.lr_decay**passed
    rest = max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - config.warmup_epochs) / rest)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD in three groups: weights, BatchNorm and biases, and gates, which have a learning rate of their own.

    Gates do not decay by default: decay pulls every logit to 0, where a gate flips.
    """
    of_gates = {id(p) for gate in find_gates(model).values() for p in gate.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "gates": []}
    for parameter in model.parameters():
        kind = "gates" if id(parameter) in of_gates else "weights" if parameter.dim() > 1 else "norms"
        groups[kind].append(parameter)
    decay = {
        "weights": config.weight_decay,
        "norms": config.weight_decay if config.norm_weight_decay else 0.0,
        "gates": config.gate_weight_decay,
    }
    return torch.optim.SGD(
        [
            {
                "params": found,
                "weight_decay": decay[kind],
                "lr_factor": config.gate_lr_factor if kind == "gates" else 1.0,
            }
            for kind, found in groups.items()
            if found
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def augmentation(data: ImageData, config: TrainConfig) -> Augment:
    """What the source suggests, as changed by `augment` and `pad`.

    Raises:
        ValueError: shifts by `pad` could leave nothing of an image.
    """
    if not config.augment:
        return Augment()
    side = min(data.image_shape[1:])
    if config.pad >= side:
        raise ValueError(f"pad: expected less than {side}, the side of the images, got {config.pad}")
    return Augment(data.augment.pad if config.pad < 0 else config.pad, data.augment.flip)


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one.

    Raises:
        ValueError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one that this machine has ({torch.cuda.device_count()} GPUs), got {name!r}")
    return device


def _would_miss(deadline: float, history: list[EpochMetrics]) -> bool:
    expected = history[-1].seconds if history else 0.0
    return time.monotonic() + expected > deadline


def _require_finite(value: float, what: str, at: StepReport, checkpoint: Path | None) -> None:
    if math.isfinite(value):
        return
    kept = f"; the checkpoint of the epoch before is kept at {checkpoint}" if checkpoint and checkpoint.exists() else ""
    raise NonFiniteLoss(
        f"{at.phase}: {what} became {value} in epoch {at.epoch}, step {at.step} of {at.steps}; "
        f"expected a finite number (a lower lr or grad_clip may help){kept}"
    )
