"""The settings of a run: all groups of options in one dataclass, checked at construction, from and to TOML."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatedconv.train.options import (
    ConsensusOptions,
    DataOptions,
    GateLossOptions,
    ModelOptions,
    RuntimeOptions,
    ScheduleOptions,
    TeacherOptions,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class TrainConfig(
    # Fields of the last group come first, on the command line and in TOML.
    RuntimeOptions,
    TeacherOptions,
    ConsensusOptions,
    GateLossOptions,
    ScheduleOptions,
    ModelOptions,
    DataOptions,
):
    """Everything that decides a run; the help of each field is also that of its command-line flag.

    A config *is* each of its groups: `learning_rate` takes `ScheduleOptions`, and a config will do.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range. Both name the field, what is allowed and the value.
    """

    def __post_init__(self) -> None:
        """Check every field, then their combinations."""
        super().__post_init__()
        self._check_schedule()
        self._check_gates()
        self._check_teacher()
        self._check_runtime()

    def _check_schedule(self) -> None:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: expected rising fractions of the run, got {list(self.milestones)}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: expected momentum above 0, got momentum 0.0")
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"batch_size: expected at least 2 images for each of the {self.accumulate} parts of `accumulate`, "
                f"got {self.batch_size}"
            )

    def _check_gates(self) -> None:
        if len(self.mac_ramp) != 2 or self.mac_ramp[0] > self.mac_ramp[1]:
            raise ValueError(f"mac_ramp: expected two rising shares of the run, got {list(self.mac_ramp)}")
        if self.mac_control == "rank" and self.consensus_at < self.mac_ramp[1]:
            raise ValueError(
                f"consensus_at: expected at least {self.mac_ramp[1]:g}, where mac_ramp ends and the gates are pruned "
                f"to mac_target; got {self.consensus_at:g}"
            )
        if self.mac_control != "none" and self.mac_weight:
            raise ValueError("mac_control: expected mac_weight 0, the loop replaces it; got both")
        if self.mac_rank == "each" and self.gate in ("layer", "both"):
            raise ValueError(
                f"mac_rank: expected 'all', a layer gate is alone in its layer; got 'each', gate {self.gate!r}"
            )
        for field, unset in (("mac_control", "none"), ("subnetwork", ""), ("consensus_at", 1.0)):
            if self.gate == "none" and getattr(self, field) != unset:
                raise ValueError(f"{field}: expected a gate, got gate 'none'")
        if self.model == "cifar_vgg":
            self._check_cifar_vgg()
        if self.consensus_at < 1 and self.epochs < 2:
            raise ValueError(f"consensus_at: expected at least 2 epochs, one on either side, got {self.epochs}")
        if self.subnetwork and self.consensus_at < 1:
            raise ValueError("subnetwork: expected consensus_at 1, a sub-network has no gates left; got both")
        if self.subnetwork and self.dense_baseline:
            raise ValueError("subnetwork: expected dense_baseline off, the sub-network is the only network; got both")

    def _check_cifar_vgg(self) -> None:
        """The network has gates between the convolutions of a group alone, and no residual blocks."""
        if self.recompute:
            raise ValueError("recompute: expected a network of residual blocks, got model 'cifar_vgg'")
        if self.gate == "none":
            return
        for field, only in (("gate", "channel"), ("position", "middle"), ("pool", "avg")):
            if getattr(self, field) != only:
                raise ValueError(f"{field}: expected {only!r} for model 'cifar_vgg', got {getattr(self, field)!r}")

    def _check_teacher(self) -> None:
        if self.teacher_at == 1:
            if self.teacher_file:
                raise ValueError(
                    "teacher_file: expected teacher_at below 1, the share of the run at which the teacher starts; got 1"
                )
            return
        if self.gate == "none":
            raise ValueError("teacher_at: expected a gate, the dense network needs no teacher; got gate 'none'")
        if self.teacher_file:
            return  # nothing is copied: it may begin at any time
        if self.mac_control == "rank" and self.teacher_at > self.mac_ramp[0]:
            raise ValueError(
                f"teacher_at: expected at most {self.mac_ramp[0]:g}, where mac_ramp begins to prune and the network "
                f"is no longer dense; got {self.teacher_at:g}"
            )
        if self.consensus_at < self.teacher_at:
            raise ValueError(
                f"teacher_at: expected at most consensus_at {self.consensus_at:g}, where the network becomes compact; "
                f"got {self.teacher_at:g}"
            )
        if self.dense_baseline:
            raise ValueError("teacher_at: expected dense_baseline off, the teacher is that network; got both")

    def _check_runtime(self) -> None:
        if self.recompute and (self.compile or self.cuda_graph):
            name = "compile" if self.compile else "cuda_graph"
            raise ValueError(
                f"{name}: cannot be combined with recompute, since a graph fixes what is kept for backward; got both"
            )
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("cuda_graph: expected a GPU, got device 'cpu'")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", self.device):
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")


def epoch_range(config: TrainConfig, phase: str) -> tuple[int, int]:
    """First epoch of a phase, counted from 0, and the epoch before which it ends.

    "dense" has all epochs; "gated" too, or those before the consensus, after which "compact", the compact network, has
    the rest.
    """
    if config.consensus_at == 1.0 or phase == "dense":
        return 0, config.epochs
    consensus = min(max(1, round(config.consensus_at * config.epochs)), config.epochs - 1)
    return (0, consensus) if phase == "gated" else (consensus, config.epochs)


# Fields that may change when a run is resumed: none belongs to the recipe. Results stay exact where `device` and
# `threads` stay; others add up in another order, and round differently. The files of `subnetwork` and `teacher_file`
# may have moved: the checkpoint loads into no other sub-network, and has a hash of the teacher.
FREE_ON_RESUME = frozenset(
    "name data_root device threads shared_device latency max_minutes tensorboard subnetwork teacher_file compile "
    "cuda_graph recompute skip_blocks workers checkpoint_minutes".split()
)


def require_same_recipe(stored: Mapping[str, Any], config: TrainConfig, where: str) -> None:
    """Check that a resumed run keeps its recipe, except for `FREE_ON_RESUME` and the folder of an archive.

    Args:
        stored: fields of the run as it was started.
        config: of the resumed run.
        where: names the file that `stored` is from; begins the message.

    Raises:
        ValueError: names the first field that differs, the expected value and the one found.
    """
    for name, spec in field_specs().items():
        # A field that is younger than the run had its present default.
        mine, theirs = getattr(config, name), stored.get(name, spec.default)
        same = _without_folder(theirs) == _without_folder(mine) if name == "data" else theirs == mine
        if name.startswith("teacher_") and config.teacher_at == 1 == stored.get("teacher_at", 1.0):
            continue  # there is no teacher
        if name not in FREE_ON_RESUME and not same:
            raise ValueError(f"{where}: expected {name} {mine!r}, found {theirs!r}")


def _without_folder(source: str) -> str:
    """A source without the folder of its archive, which may have moved."""
    kind, _, path = source.partition(":")
    return f"npz:{Path(path).name}" if kind == "npz" else source


def field_specs() -> dict[str, dataclasses.Field[Any]]:
    """Every field of `TrainConfig` by name, in order."""
    return {spec.name: spec for spec in dataclasses.fields(TrainConfig)}


def make_config(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Build a config from field names and values; fields left out get their defaults.

    Raises:
        ValueError: an unknown field (with the nearest known one) or a value that is not allowed.
        TypeError: a value of the wrong type.
    """
    known = field_specs()
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: unknown field {key!r}{hint}")
    return TrainConfig(**values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The fields set in a TOML file, as plain values.

    Raises:
        ValueError: the file is missing, is no TOML, or holds tables.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a TOML file, found nothing there") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: expected a TOML file, could not read it ({error})") from None
    tables = [key for key, value in values.items() if isinstance(value, dict)]
    if tables:
        raise ValueError(f"{path}: expected plain keys, found the table [{tables[0]}]")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def to_toml(config: TrainConfig) -> str:
    """Every field of a config as TOML, each under its help text; `read_toml` gives the same values back."""
    import tomli_w

    lines = []
    for name, spec in field_specs().items():
        value = getattr(config, name)
        lines.append(f"# {spec.metadata['help']}")
        lines.append(tomli_w.dumps({name: list(value) if isinstance(value, tuple) else value}).strip())
    return "\n".join(lines) + "\n"
