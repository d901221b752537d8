"""What a step minimises, how, and where: losses and their weights over the run, optimiser, device, batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatedconv.data import Augment, ImageData, TrainBatches
from gatedconv.gating import (
    GatePruner,
    MacController,
    activation_loss,
    find_gates,
    mac_target_loss,
    polarization_loss,
    schedules,
)
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.distributed import ALONE, Ranks


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
    loss = task_loss(logits, labels, config)
    if not find_gates(model):
        return loss, None
    of_gates, polarization = gate_loss(model, config, gate_weights(config, progress), controller)
    return loss + of_gates, polarization


def task_loss(logits: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    """Cross-entropy of logits (B, classes) against int64 (B,), in fp32."""
    return functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)


def lesson(task: Tensor, logits: Tensor, taught: Tensor, config: TrainConfig) -> Tensor:
    """The loss of a taught step, a scalar: (1 - w) task + w T^2 KL(teacher || pupil), both softened by T.

    From Hinton et al. 2015.

    Args:
        task: loss on the labels, a scalar.
        logits: of the pupil (B, classes).
        taught: of the teacher (B, classes); no gradient goes there.
        config: has the weight w and the temperature T.
    """
    soft, weight = config.teacher_temperature, config.teacher_weight
    mine, theirs = (functional.log_softmax(each.float() / soft, 1) for each in (logits, taught.detach()))
    divergence = functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return (1 - weight) * task + weight * soft**2 * divergence


class GateWeights(NamedTuple):
    """What the losses on the gates depend on besides the network: floats, or float32 scalars () where it trains.

    Attributes:
        polar: λ of the polarization loss.
        act: of the activation loss.
        mac: of the MAC-target loss.
        wanted: the controller's target, a share of all MACs; None before it begins.
    """

    polar: float | Tensor
    act: float | Tensor
    mac: float | Tensor
    wanted: float | Tensor | None


def gate_weights(config: TrainConfig, progress: float) -> GateWeights:
    """The weights at a progress in [0, 1]."""
    ramp = schedules.linear_warmup(progress, 1.0, config.gate_warmup)
    controls = config.mac_control == "price" and progress >= config.mac_ramp[0]
    return GateWeights(
        polar_weight(config, progress),
        ramp * config.act_weight,
        ramp * config.mac_weight,
        macs_wanted(config, progress) if controls else None,
    )


def gate_loss(
    model: nn.Module, config: TrainConfig, weights: GateWeights, controller: MacController | None = None
) -> tuple[Tensor, Tensor]:
    """What `config` asks of the gates at these weights; and the polarization part before its weight."""
    polarization = polarization_loss(model)
    weighs = isinstance(weights.polar, Tensor) or weights.polar  # a scalar on a device is not looked at
    loss = weights.polar * polarization if weighs else torch.zeros_like(polarization)
    if config.act_weight:
        loss = loss + weights.act * activation_loss(model, weight=config.act_weighting)
    if config.mac_weight:
        loss = loss + weights.mac * mac_target_loss(model, target=config.mac_target)
    if controller is not None and weights.wanted is not None:
        loss = loss + controller(model, weights.wanted)
    return loss, polarization


def make_controller(model: nn.Module, config: TrainConfig) -> MacController | None:
    """The price of the MACs, if `config` asks for one and the network has gates to move.

    It is asked once for each part of an accumulated batch.
    """
    wanted = config.mac_control == "price" and bool(find_gates(model))
    return MacController(config.mac_gain / config.accumulate) if wanted else None


def make_pruner(model: nn.Module, config: TrainConfig) -> GatePruner | None:
    """What shuts gates in order of rank, if `config` asks for it and the network has gates."""
    wanted = config.mac_control == "rank" and bool(find_gates(model))
    return GatePruner(model, even=config.mac_rank == "each") if wanted else None


def prune_gates(pruner: GatePruner, config: TrainConfig, progress: float) -> None:
    """After a step at a progress in [0, 1]: shut what the MACs wanted by then leave no room for."""
    if progress >= config.mac_ramp[0]:
        pruner.step(macs_wanted(config, progress))


def macs_wanted(config: TrainConfig, progress: float) -> float:
    """MACs that `mac_control` aims at, as a share of the dense network's, at a progress in [0, 1]."""
    start, end = config.mac_ramp
    return schedules.falling(progress, config.mac_target, start, end, config.mac_ramp_power)


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
    optimizer = torch.optim.SGD(
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
    if config.momentum:
        # PyTorch makes them in the first step, and leaves them undefined where that step is skipped. From zeros
        # the first step does the same.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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


def mixed_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """What `amp` computes convolutions in on a device; None for the parameters' own dtype."""
    if config.amp == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]


@contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """While it lasts, cuDNN measures which of its algorithms is fastest for each shape: for steps, whose shapes stay.

    Not where the user wants the same ones every time.
    """
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        yield
        return
    before = cudnn.benchmark
    _set_benchmark(True)
    try:
        yield
    finally:
        _set_benchmark(before)


def _set_benchmark(on: bool) -> None:
    # As an attribute it is refused once `torch.backends.disable_global_flags` was called, which is for flags that stay;
    # and cudnn.set_flags reads all flags, which raises where the precision was set for one kind of operator alone.
    torch._C._set_cudnn_benchmark(on)


def train_batches(config: TrainConfig, data: ImageData, phase: str = "gated", ranks: Ranks = ALONE) -> TrainBatches:
    """The batches that a run trains on; a training that does not begin with the run draws others than its first.

    Raises:
        ValueError: the batch size or `pad` does not fit the data, the number of processes or the parts that each
            computes its share in, or no such device; the same on every process.
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


def placement(config: TrainConfig) -> dict[str, Any]:
    """Where batches are made and in which layout, as arguments of `TrainBatches` and `EvalBatches`."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return {"device": resolve_device(config.device), "memory_format": layout}


def place(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Move a network to where the batches of a run are, in their layout; returns it."""
    moved: nn.Module = model.to(resolve_device(config.device)).to(memory_format=placement(config)["memory_format"])
    return moved
