"""Distillation: a dense copy of the network trains along with the student and teaches it; or a finished one does."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv._io import first_line
from gatedconv.data import ImageData
from gatedconv.deploy import load
from gatedconv.train.build import build_model
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.cuda_graph_step import make_stepper
from gatedconv.train.device import mixed_dtype, place, resolve_device
from gatedconv.train.distributed import SINGLE, Ranks
from gatedconv.train.skip_dead import StepMacs
from gatedconv.train.step import Stepper


def make_teacher(
    config: TrainConfig, data: ImageData, phase: str, ranks: Ranks = SINGLE
) -> Teacher | FinishedTeacher | None:
    """The teacher that `config` selects for a phase; None for a dense baseline.

    Raises:
        ValueError: `teacher_file` is missing, or holds another kind of network.
    """
    if config.teacher_at == 1 or (phase == "dense" and not config.subnetwork):
        return None
    if config.teacher_file:
        return FinishedTeacher(config, build_model(config, data, gated=False))
    return Teacher(config, lambda: build_model(config, data, gated=False), ranks)


class Teacher:
    """The dense network from `teacher_at` on: a copy of the student before its gates close, trained in the same way.

    It begins an epoch before the consensus at the latest.

    Its logits enter the student's loss (`recipe.distillation_loss`) without another pass: they come from the dense
    network's own training step on the same batch. A run ends with both networks, dense and compact.

    Args:
        config: of the run.
        make_dense: makes a network without gates with the initial weights of the run. A student that is compact from
            the start (`subnetwork`) has a teacher that trains from the start.
        ranks: the processes of the run.

    Attributes:
        stepper: trains the dense network; None before `teacher_at`.
    """

    def __init__(self, config: TrainConfig, make_dense: Callable[[], nn.Module], ranks: Ranks = SINGLE) -> None:
        self.stepper: Stepper | None = None
        last = epoch_range(config, "gated")[1] - 1  # after the consensus the student is compact
        self._at, self._epochs, self._ranks = min(config.teacher_at, last / config.epochs), config.epochs, ranks
        self._from_start = bool(config.subnetwork)
        self._config = dataclasses.replace(
            config, gate="none", mac_control="none", consensus_at=1.0, subnetwork="", teacher_at=1.0
        )
        self._make_dense = make_dense
        self._student: Stepper | None = None

    def begin(self, student: Stepper) -> None:
        """Teach a student: the gated network, which the teacher is copied from, or the compact one."""
        self._student = student
        if self._from_start and self.stepper is None:
            self.stepper = self._new_stepper()

    def __call__(self, images: Tensor, labels: Tensor, epoch: float) -> Tensor | None:
        """Train on a batch (B, C, H, W), int64 (B,), at `epoch`; the logits (B, classes), None before `teacher_at`."""
        teaches = epoch / self._epochs >= self._at
        if self.stepper is None and teaches:
            self.stepper = self._copied_from_student()
        if self.stepper is None:
            return None
        with self.stepper.active():
            logits = self.stepper(images, labels, epoch).logits
        return logits if teaches else None

    def average(self, weight: float) -> None:
        """Average running statistics over the ranks, as `Stepper.average` does; a collective."""
        if self.stepper is not None:
            self.stepper.average(weight)

    def state_dict(self) -> dict[str, Any]:
        """The parts of its training by name; empty before `teacher_at`."""
        if self.stepper is None:
            return {}
        parts = self.stepper.parts | {"guard": self.stepper.guard}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state dict.

        Raises:
            KeyError, RuntimeError, ValueError: it is that of another network.
        """
        if not state:
            return
        if self.stepper is None:
            self.stepper = self._new_stepper()
        for name, part in self.stepper.parts.items():
            part.load_state_dict(state[name])
        self.stepper.guard.buffers.keep()
        self.stepper.guard.load_state_dict(state["guard"])

    def _new_stepper(self) -> Stepper:
        device = self._student.device if self._student is not None else torch.device("cpu")
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's random numbers stay
            network = place(self._make_dense(), self._config).train()
        return make_stepper(network, self._config, device, self._ranks)

    def _copied_from_student(self) -> Stepper:
        """A dense copy of the student as it is now, momentum included.

        Raises:
            ValueError: the student is not a gated form of the network that `make_dense` makes.
        """
        assert self._student is not None
        stepper, student = self._new_stepper(), self._student
        student.guard.repair()  # a bad step may not have been repaired yet
        found = student.model.state_dict()
        missing = stepper.model.state_dict().keys() - found.keys()
        if missing:
            raise ValueError(f"teacher: expected a gated form of the dense network, it lacks {sorted(missing)[0]!r}")
        stepper.model.load_state_dict({name: found[name] for name in stepper.model.state_dict()})
        before = dict(student.model.named_parameters())
        for name, parameter in stepper.model.named_parameters():
            for key, value in student.optimizer.state.get(before[name], {}).items():  # none where it does not learn
                if isinstance(value, Tensor):
                    stepper.optimizer.state[parameter][key].copy_(value)
        if stepper.lookahead is not None and student.lookahead is not None:
            stepper.lookahead.start_from(student.lookahead)
        stepper.guard.buffers.keep()
        return stepper


class FinishedTeacher:
    """A dense network that was trained before: it teaches from `teacher_at` on, and does not change.

    Args:
        config: of the run; names the file, and the precision.
        dense: the network of the run without gates, into which the file is loaded.

    Attributes:
        stepper: None: nothing trains.
        macs: of its forward passes; counts `executed`.

    Raises:
        ValueError: the file is missing, or holds the weights of another network.
    """

    stepper = None

    def __init__(self, config: TrainConfig, dense: nn.Module) -> None:
        path = Path(config.teacher_file)
        try:
            dense.load_state_dict(load(path).state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"teacher_file: expected the weights of {config.model}, dense, in {path}: {first_line(error)}"
            ) from None
        self._network = place(dense, config).eval()
        self._at = config.teacher_at * config.epochs
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.macs = StepMacs(self._network)
        device = resolve_device(config.device)
        half = mixed_dtype(config.amp, device)
        self._autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)

    def begin(self, student: Stepper) -> None:
        """Teach a student; nothing depends on which."""

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, epoch: float) -> Tensor | None:
        """The logits (B, classes) on images (B, C, H, W); None before `teacher_at`."""
        if epoch < self._at:
            return None
        self.macs.executed += len(images) * self.macs.per_image
        with self._autocast:
            logits: Tensor = self._network(images)
        return logits

    def average(self, weight: float) -> None:
        """Nothing: every rank has the same weights."""

    def state_dict(self) -> dict[str, Any]:
        """A hash of the file."""
        return {"file": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the run continues with the same teacher; ValueError where it does not."""
        if state.get("file") != self._digest:
            raise ValueError("teacher_file: another file than the run began with")
