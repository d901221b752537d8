"""Distillation within one run: the whole network trains on beside what is pruned from it, and teaches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.data import ImageData
from gatedconv.train.build import build_model
from gatedconv.train.captured import make_stepper
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.distributed import ALONE, Ranks
from gatedconv.train.recipe import place
from gatedconv.train.step import Stepper


def teacher_of(config: TrainConfig, data: ImageData, phase: str, ranks: Ranks = ALONE) -> Teacher | None:
    """The teacher that `config` asks for in a training of a run; None for a dense baseline, which is whole."""
    if config.teacher_at == 1 or (phase == "dense" and not config.subnetwork):
        return None
    return Teacher(config, lambda: build_model(config, data, gated=False), ranks)


class Teacher:
    """The whole network from `teacher_at` on: a copy of the pupil before its gates shut, trained like it, beside it.

    It begins an epoch before the consensus at the latest.

    Its logits are a part of what the pupil is asked for (`recipe.lesson`). They cost no pass of their own: they come
    from the whole network's own training step, on the same batch. A run ends with both, the whole network and what was
    cut out of it.

    Args:
        config: of the run.
        make_whole: a network without gates and with the initial weights of the run. A pupil that is a part of it from
            the start (`subnetwork`) is taught by one that trains from the start.
        ranks: the processes of the run.

    Attributes:
        stepper: what trains the whole network; None before there is one.
    """

    def __init__(self, config: TrainConfig, make_whole: Callable[[], nn.Module], ranks: Ranks = ALONE) -> None:
        self.stepper: Stepper | None = None
        last = epoch_range(config, "gated")[1] - 1  # what is left after the consensus is whole no more
        self._at, self._epochs, self._ranks = min(config.teacher_at, last / config.epochs), config.epochs, ranks
        self._from_start = bool(config.subnetwork)
        self._config = dataclasses.replace(
            config, gate="none", mac_control="none", consensus_at=1.0, subnetwork="", teacher_at=1.0
        )
        self._make_whole = make_whole
        self._pupil: Stepper | None = None

    def begin(self, pupil: Stepper) -> None:
        """Be there for a pupil: the whole network, whose copy it becomes, or what was cut out of it since."""
        self._pupil = pupil
        if self._from_start and self.stepper is None:
            self.stepper = self._whole()

    def __call__(self, images: Tensor, labels: Tensor, epoch: float) -> Tensor | None:
        """Train on a batch (B, C, H, W), int64 (B,), at `epoch`; the logits (B, classes), None before `teacher_at`."""
        teaches = epoch / self._epochs >= self._at
        if self.stepper is None and teaches:
            self.stepper = self._copied()
        if self.stepper is None:
            return None
        with self.stepper.active():
            logits = self.stepper(images, labels, epoch).logits
        return logits if teaches else None

    def join(self, weight: float) -> None:
        """As `Stepper.join`; a collective."""
        if self.stepper is not None:
            self.stepper.join(weight)

    def state_dict(self) -> dict[str, Any]:
        """The parts of its training by name; none before `teacher_at`."""
        if self.stepper is None:
            return {}
        parts = self.stepper.parts | {"guard": self.stepper.guard}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state dict.

        Raises:
            KeyError, RuntimeError, ValueError: it is that of another network.
        """
        if not state:
            return
        if "average" in state:
            raise ValueError("its teacher is that of an earlier version, an average of weights")
        if self.stepper is None:
            self.stepper = self._whole()
        for name, part in self.stepper.parts.items():
            part.load_state_dict(state[name])
        self.stepper.guard.buffers.keep()
        self.stepper.guard.load_state_dict(state["guard"])

    def _whole(self) -> Stepper:
        device = self._pupil.device if self._pupil is not None else torch.device("cpu")
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's own numbers go on
            network = place(self._make_whole(), self._config).train()
        return make_stepper(network, self._config, device, self._ranks)

    def _copied(self) -> Stepper:
        """The pupil as it is now, without its gates; its momentum goes on too.

        Raises:
            ValueError: the pupil is not a gated form of the network that `make_whole` makes.
        """
        assert self._pupil is not None
        stepper, pupil = self._whole(), self._pupil
        pupil.guard.settle()  # a bad step may not have been repaired yet
        found = pupil.model.state_dict()
        missing = stepper.model.state_dict().keys() - found.keys()
        if missing:
            raise ValueError(f"teacher: expected a gated network around the whole one, it lacks {sorted(missing)[0]!r}")
        stepper.model.load_state_dict({name: found[name] for name in stepper.model.state_dict()})
        before = dict(pupil.model.named_parameters())
        for name, parameter in stepper.model.named_parameters():
            for key, value in pupil.optimizer.state[before[name]].items():
                if isinstance(value, Tensor):
                    stepper.optimizer.state[parameter][key].copy_(value)
        stepper.guard.buffers.keep()
        return stepper
