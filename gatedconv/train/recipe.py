"""The recipe: losses, their weights over the run, and batches; the learning rate is in optimizer.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv.data import Augment, EvalBatches, ImageData, TrainBatches
from gatedconv.gating import MacController, activation_loss, mac_target_loss, polarization_loss, schedules
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.device import placement
from gatedconv.train.distributed import SINGLE, Ranks
from gatedconv.train.options import DataOptions, GateLossOptions, TeacherOptions


def task_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (B, classes) against int64 labels (B,), in fp32; a scalar."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def distillation_loss(task: Tensor, student: Tensor, teacher: Tensor, options: TeacherOptions) -> Tensor:
    """The loss with a teacher, a scalar: (1 - w) task + w T^2 KL(teacher || student), both softened by T.

    From Hinton et al. 2015.

    Args:
        task: loss on the labels, a scalar.
        student: logits (B, classes).
        teacher: logits (B, classes); they get no gradient.
        options: the weight w and the temperature T.
    """
    soft, weight = options.teacher_temperature, options.teacher_weight
    mine, theirs = (F.log_softmax(each.float() / soft, 1) for each in (student, teacher.detach()))
    divergence = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return (1 - weight) * task + weight * soft**2 * divergence


def closing_note(config: TrainConfig) -> str:
    """A note that no setting of a run makes gates close; "" where one does.

    Polarization alone is as low where every gate is open as where it is closed.
    """
    pulls = config.mac_weight or config.act_weight or config.mac_control != "none" or config.consensus_by != "vote"
    if config.gate == "none" or config.subnetwork or pulls:
        return ""
    return (
        "nothing aims at fewer MACs, since mac_weight, act_weight and mac_control are off; "
        f"mac_weight 4 aims at {config.mac_target:.0%} of the MACs (mac_target)"
    )


class GateWeights(NamedTuple):
    """Weights of the losses on the gates at one step: floats, or float32 scalars () on the device.

    Attributes:
        polar: λ of the polarization loss.
        act: of the activation loss.
        mac: of the MAC-target loss.
        mac_share: MACs that the controller aims at, as a share of the dense network's; None before it begins.
    """

    polar: float | Tensor
    act: float | Tensor
    mac: float | Tensor
    mac_share: float | Tensor | None


def gate_weights(options: GateLossOptions, progress: float) -> GateWeights:
    """The weights at a progress in [0, 1]."""
    ramp = schedules.linear_warmup(progress, 1.0, options.gate_warmup)
    controls = options.mac_control == "price" and progress >= options.mac_ramp[0]
    return GateWeights(
        polar_weight(options, progress),
        ramp * options.act_weight,
        ramp * options.mac_weight,
        mac_share_at(options, progress) if controls else None,
    )


def gate_loss(
    model: nn.Module, options: GateLossOptions, weights: GateWeights, controller: MacController | None = None
) -> tuple[Tensor, Tensor]:
    """The losses on the gates (eq. 9 less the task's, and the MAC target), a scalar; the unweighted polarization."""
    polarization = polarization_loss(model)
    weighs = isinstance(weights.polar, Tensor) or weights.polar  # a scalar on the device is not read
    loss = weights.polar * polarization if weighs else torch.zeros_like(polarization)
    if options.act_weight:
        loss = loss + weights.act * activation_loss(model, weight=options.act_weighting)
    if options.mac_weight:
        loss = loss + weights.mac * mac_target_loss(model, target=options.mac_target)
    if controller is not None and weights.mac_share is not None:
        loss = loss + controller(model, weights.mac_share)
    return loss, polarization


def mac_share_at(options: GateLossOptions, progress: float) -> float:
    """MACs that `mac_control` aims at, as a share of the dense network's, at a progress in [0, 1]."""
    start, end = options.mac_ramp
    return schedules.falling(progress, options.mac_target, start, end, options.mac_ramp_power)


def polar_weight(options: GateLossOptions, progress: float) -> float:
    """λ of the polarization loss at a progress in [0, 1]."""
    if options.polar_schedule == "rising":
        return schedules.rising(progress, options.polar_weight)
    if options.polar_schedule == "warmup":
        return schedules.linear_warmup(progress, options.polar_weight, options.gate_warmup)
    return options.polar_weight


def augmentation(data: ImageData, options: DataOptions) -> Augment:
    """The augmentation that the source suggests, changed by `augment`, `pad`, `border` and `flip`.

    Raises:
        ValueError: shifts by `pad` could leave nothing of an image.
    """
    if not options.augment:
        return Augment()
    side = min(data.image_shape[1:])
    if options.pad >= side:
        raise ValueError(f"pad: expected less than {side}, the side of the images, got {options.pad}")
    pad = data.augment.pad if options.pad < 0 else options.pad
    return Augment(
        pad, data.augment.flip, mirrored=options.border == "mirrored", alternating=options.flip == "alternating"
    )


def train_batches(config: TrainConfig, data: ImageData, phase: str = "gated", ranks: Ranks = SINGLE) -> TrainBatches:
    """The training batches of a phase; one that does not begin with the run draws other batches than the first.

    Raises:
        ValueError: the batch size or `pad` does not fit the data, the number of processes or of `accumulate`d parts,
            or the device does not exist; the same on every process.
    """
    least = 2 * ranks.world * config.accumulate
    if config.accumulate > 1 and config.batch_size < least:
        raise ValueError(
            f"batch_size: expected at least {least}, 2 images for each of {config.accumulate} parts of `accumulate` "
            f"on each of {ranks.world} processes, got {config.batch_size}"
        )
    return TrainBatches(
        data,
        config.batch_size,
        augment=augmentation(data, config),
        rank=ranks.rank,
        world=ranks.world,
        seed=(config.seed + (epoch_range(config, phase)[0] << 32)) % 2**63,
        **placement(config),
    )


def eval_batches(config: TrainConfig, data: ImageData, split: str = "test", ranks: Ranks = SINGLE) -> EvalBatches:
    """The batches of this rank's share of a split, in order and without augmentation."""
    return EvalBatches(data, split, **placement(config), rank=ranks.rank, world=ranks.world)
