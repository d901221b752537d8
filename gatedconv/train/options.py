"""The options of a run, in groups: frozen dataclasses whose fields have a help text and check their values."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from gatedconv.gating import ESTIMATORS
from gatedconv.gating.gates import POOLS
from gatedconv.models import BUILDERS
from gatedconv.nn.block import GATES, POSITIONS
from gatedconv.ops.estimate import DEFAULT_TEMPERATURE

MAX_THREADS = 4096
_SEED_LIMIT = 2**63 - 1  # the largest seed that every generator accepts


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its help text and its allowed values: one of `choices`, or low <= value <= high.

    `above` is a lower bound that is itself not allowed. For tuples the bounds hold for each element.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """A group of options; each field is checked by itself."""

    def __post_init__(self) -> None:
        """Check every field. TypeError or ValueError names the field, what is allowed and the value."""
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))


@dataclass(frozen=True)
class DataOptions(Options):
    """The images, and how training changes them."""

    name: str = option("", "label of the run; presets set it")
    data: str = option("digits", "digits, cifar10, cifar100, npz:PATH or imagefolder:PATH")
    data_root: str = option("data", "folder for downloaded data")
    image_size: int = option(32, "side in pixels to which imagefolder images are scaled", low=8, high=2048)
    image_range: float = option(0.0, "largest value of images of more than 8 bits; 0 for their type's", low=0.0)
    split_seed: int = option(0, "seed of the splits of a source that has none of its own", low=0, high=_SEED_LIMIT)
    evaluate_on: str = option("test", "split to evaluate on; make choices on val", choices=("test", "val"))
    val_fraction: float = option(0.1, "share of the train split that becomes val", above=0.0, high=0.5)
    augment: bool = option(True, "random shifts, and flips where the source allows them")
    pad: int = option(-1, "pixels of the largest random shift; -1 for what suits the source", low=-1)
    border: str = option(
        "black", "what random shifts bring in: black, or the image mirrored at its edge", choices=("black", "mirrored")
    )
    flip: str = option(
        "random",
        "random: each image is flipped with p = 0.5 every epoch; alternating: random in epoch 1, then every other "
        "epoch, so that two epochs show each image both ways (Jordan 2024, arXiv:2404.00498)",
        choices=("random", "alternating"),
    )
    stream: bool = option(False, "imagefolder: decode images while training, not all at the start")
    workers: int = option(2, "processes that decode streamed images; 0 decodes between steps", low=0, high=256)


@dataclass(frozen=True)
class ModelOptions(Options):
    """The network and its gates."""

    model: str = option("resnet20", "network", choices=tuple(BUILDERS))
    shortcut: str = option("B", "shortcut where shapes change: A padding, B projection", choices=("A", "B"))
    gate: str = option("layer", "what is gated; none trains the dense network", choices=("none", *GATES))
    position: str = option(
        "after", "where channel gates sit in a block; the best- presets use middle", choices=POSITIONS
    )
    estimator: str = option("ste", "gradient estimator of the gates", choices=tuple(ESTIMATORS))
    temperature: float = option(DEFAULT_TEMPERATURE, "temperature of the gumbel estimator", above=0.0)
    hidden: int = option(16, "hidden units of a gate; 0 for a single linear layer (1FC)", low=0, high=4096)
    pool: str = option("avg", "how a channel gate reads its input", choices=POOLS)
    gate_bias: float = option(
        0.5, "first logit of every gate: above 0 is open; ste gives gradients within [-1, 1] only", low=-10.0, high=10.0
    )
    dense_baseline: bool = option(False, "first train the dense network, same seed and recipe")
    subnetwork: str = option(
        "", "train this part of the gated network alone from the start: even, or the consensus.json of a run"
    )


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """The optimizer and its schedule."""

    epochs: int = option(40, "passes over the train split", low=1)
    batch_size: int = option(128, "images per step", low=2)
    lr: float = option(0.1, "highest learning rate", above=0.0)
    schedule: str = option(
        "cosine",
        "learning rate after the warm-up; triangular falls in a line (Page 2018, How to train your ResNet)",
        choices=("cosine", "staged", "triangular"),
    )
    lr_end: float = option(0.0, "triangular: share of lr that is left at the end of the run", low=0.0, high=1.0)
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "staged: fractions of the run at which the rate drops", above=0.0, high=1.0
    )
    lr_decay: float = option(0.1, "staged: factor at each milestone", above=0.0, high=1.0)
    warmup_epochs: float = option(0.0, "epochs of linear learning-rate warm-up", low=0.0)
    momentum: float = option(0.9, "momentum of SGD", low=0.0, high=1.0)
    nesterov: bool = option(True, "Nesterov momentum")
    weight_decay: float = option(5e-4, "weight decay of the network", low=0.0)
    norm_weight_decay: bool = option(True, "weight decay also on BatchNorm and biases")
    norm_bias_lr_factor: float = option(
        1.0,
        "learning rate of the BatchNorm biases over that of the network; their decay in a step stays (Jordan 2024 has "
        "64: biases that move fast replace scales that do not learn)",
        above=0.0,
    )
    lookahead: float = option(
        0.0,
        "averaged weights: every 5th step the weights become the mean of themselves and their running mean, whose "
        "share rises from 0 with the cube of the progress to this at the end (Lookahead, Zhang et al. 2019, as in "
        "Jordan 2024, who has 0.77); 0 for none",
        low=0.0,
        high=0.999,
    )
    gate_lr_factor: float = option(1.0, "learning rate of the gates over that of the network", above=0.0)
    gate_weight_decay: float = option(0.0, "weight decay of the gates", low=0.0)
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy", low=0.0, high=0.9)
    grad_clip: float = option(0.0, "largest gradient norm; 0 does not clip", low=0.0)


@dataclass(frozen=True)
class GateLossOptions(Options):
    """The losses on the gates, and the control of the MACs."""

    polar_weight: float = option(3.0, "λ of the polarization loss, at its highest", low=0.0)
    polar_schedule: str = option(
        "rising",
        "λ over the run; rising: 0, then 2/3 of polar_weight, then all of it",
        choices=("constant", "rising", "warmup"),
    )
    act_weight: float = option(0.0, "weight of the activation loss", low=0.0)
    act_weighting: str = option(
        "uniform", "activation loss: every gate alike, or by the MACs that it controls", choices=("uniform", "macs")
    )
    mac_weight: float = option(0.0, "weight of the MAC-target loss", low=0.0)
    mac_target: float = option(0.5, "target MACs, as a share of the dense network's", above=0.0, high=1.0)
    gate_warmup: float = option(
        0.0, "share of the run over which the weights above rise (polar_schedule: warmup)", low=0.0, high=1.0
    )
    mac_control: str = option(
        "none",
        "how mac_target is reached in place of mac_weight: a price adapts the penalty, rank prunes the least important "
        "gates, as the best- presets do",
        choices=("none", "price", "rank"),
    )
    mac_rank: str = option(
        "all",
        "mac_control rank: all gates ranked together, or the channels of each gate alone, with the same share pruned",
        choices=("all", "each"),
    )
    mac_gain: float = option(0.02, "mac_control price: how fast the price changes in a step", above=0.0)
    mac_ramp: tuple[float, ...] = option(
        (0.15, 0.45),
        "shares of the run between which the controller's target falls from all MACs to mac_target",
        low=0.0,
        high=1.0,
    )
    mac_ramp_power: float = option(
        1.0, "shape of that fall: 1 for a straight line; with more, most of it comes early", above=0.0, high=10.0
    )


@dataclass(frozen=True)
class ConsensusOptions(Options):
    """When and how the gates agree, and what is done with the compact network."""

    consensus_at: float = option(
        1.0,
        "share of the run after which the gates' consensus is frozen; training continues with the compact network",
        above=0.0,
        high=1.0,
    )
    consensus_by: str = option(
        "vote",
        "what decides: the vote of the samples, or gates ranked (by mean logit, by Fisher information) to mac_target",
        choices=("vote", "logit", "fisher"),
    )
    bn_reestimate: bool = option(True, "re-estimate BatchNorm statistics on the frozen network")
    bn_images: int = option(0, "training images for that, in whole batches, at least one; 0 for all", low=0)
    latency: bool = option(True, "measure latency at batch 1 and 32")


@dataclass(frozen=True)
class TeacherOptions(Options):
    """Distillation from the dense network, which trains in the same run or has trained before."""

    teacher_at: float = option(
        1.0,
        "share of the run after which a dense copy trains beside the network and teaches it; 1 for no teacher",
        low=0.0,
        high=1.0,
    )
    teacher_file: str = option(
        "", "the dense.safetensors of a finished run, which then teaches in place of a copy that trains too"
    )
    teacher_weight: float = option(
        0.5, "weight of the teacher in the loss; the labels have the rest", above=0.0, high=1.0
    )
    teacher_temperature: float = option(4.0, "temperature that softens teacher and student", above=0.0)


@dataclass(frozen=True)
class RuntimeOptions(Options):
    """The machine: devices, precision, memory, checkpoints, limits."""

    seed: int = option(0, "seed of initial weights, order, augmentation and gates", low=0, high=_SEED_LIMIT)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(0, "CPU threads; 0 for PyTorch's default", low=0, high=MAX_THREADS)
    shared_device: bool = option(False, "other work runs on the device: energy and latency are not measured")
    amp: str = option(
        "off",
        "mixed precision; auto is bf16 on devices that compute in it, off elsewhere",
        choices=("off", "auto", "bf16", "fp16"),
    )
    channels_last: bool = option(True, "channels-last memory format")
    compile: bool = option(False, "torch.compile the network for training")
    cuda_graph: bool = option(False, "replay each training step, metrics included, as one CUDA graph (needs a GPU)")
    accumulate: int = option(1, "parts that each batch is split into (gradient accumulation)", low=1, high=4096)
    recompute: bool = option(False, "gradient checkpointing: recompute each block in backward, to save memory")
    skip_blocks: bool = option(True, "do not compute blocks that a layer gate closes for the whole batch")
    sync_norm: str = option(
        "off",
        "BatchNorm statistics over all processes: of none, of the gates' norms, or of all",
        choices=("off", "gates", "all"),
    )
    checkpoint_minutes: float = option(0.0, "also write a checkpoint this often within an epoch; 0 never", low=0.0)
    max_minutes: float = option(0.0, "stop after this, with a checkpoint to resume from; 0 never", low=0.0)
    tensorboard: bool = option(False, "also write TensorBoard event files")


def field_type(spec: dataclasses.Field[Any]) -> type:
    """The type of a field: str, int, float, bool or tuple (of floats); defaults have exactly that type."""
    return type(spec.default)


def _checked(spec: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the field's own type, or an error that names the field, what is allowed and the value."""
    kind = field_type(spec)
    if kind is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{spec.name}: expected a list of numbers, got {value!r}")
        return tuple(_checked_number(spec, float, element) for element in value)
    if kind in (int, float):
        return _checked_number(spec, kind, value)
    if not isinstance(value, kind):
        raise TypeError(f"{spec.name}: expected {kind.__name__}, got {value!r}")
    choices = spec.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{spec.name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def _checked_number(spec: dataclasses.Field[Any], kind: type, value: Any) -> Any:
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{spec.name}: expected {'a whole number' if kind is int else 'a number'}, got {value!r}")
    low, high, above = (spec.metadata[key] for key in ("low", "high", "above"))
    inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    if not inside or not abs(value) <= sys.float_info.max:  # nor infinite, nor NaN
        limits = ((low, f"at least {low}"), (above, f"above {above}"), (high, f"at most {high}"))
        bounds = [text for bound, text in limits if bound is not None]
        raise ValueError(f"{spec.name}: expected {' and '.join(bounds) or 'a finite number'}, got {value!r}")
    return kind(value)
