"""Self-distillation within one run: the average of the whole network's weights teaches what is left of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatedconv.deploy import compact
from gatedconv.deploy.freeze import freeze_gates
from gatedconv.gates import find_gates
from gatedconv.train.config import TrainConfig
from gatedconv.train.distributed import current

SPAN = 0.05  # of the run: how far back the average remembers
SETTLING = 40  # lessons over which the teacher's BatchNorm statistics are worked out
_Norm = nn.modules.batchnorm._BatchNorm


class Teacher:
    """Follows a network's weights up to `teacher_at`, then teaches with their average, every gate open.

    At a high learning rate the average of the weights is much better than the weights of any step (Polyak and
    Juditsky 1992), and nothing was trained for it. Its BatchNorm statistics are worked out over its first lessons,
    which it gives with those of each batch: running statistics of the training are those of other weights. A lesson
    is the teacher's softened answer (Hinton et al. 2015), with a weight that falls from `teacher_weight` to 0 at the
    end of the run: by then the pupil knows better.

    Args:
        config: of the run.

    Attributes:
        macs_per_image: multiply-accumulates of one lesson, a forward pass of the whole network; 0 where unknown.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.macs_per_image = 0.0
        self._config = config
        self._model: nn.Module | None = None
        self._average: dict[str, Tensor] = {}
        self._progress, self._lessons = 0.0, 0
        self._network: nn.Module | None = None
        self._statistics: dict[str, Tensor] = {}  # of a state dict, until there is a network again

    @property
    def begun(self) -> bool:
        """Whether there is a network that it follows, or has followed."""
        return self._model is not None

    def begin(self, model: nn.Module, macs_per_image: float = 0.0) -> None:
        """Follow a network that lies where it is trained; ``macs_per_image`` are those of its forward pass."""
        self._model, self.macs_per_image = model, macs_per_image
        self._average = {name: weight.clone() for name, weight in self._weights().items()}

    def join(self) -> None:
        """Give every process the mean of the statistics so far, of which a checkpoint holds one; a collective."""
        if self._network is not None and self._lessons < SETTLING:  # all have the same ones from then on
            current().average_buffers(self._network)

    def state_dict(self) -> dict[str, Any]:
        """The average, the progress up to which it goes, the lessons given and the statistics made in them."""
        return {
            "average": dict(self._average),
            "progress": self._progress,
            "lessons": self._lessons,
            "statistics": self._statistics if self._network is None else dict(self._network.named_buffers()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state dict.

        Raises:
            KeyError, RuntimeError: it is that of another network.
        """
        for name, average in self._average.items():
            average.copy_(state["average"][name])
        self._progress, self._lessons = float(state["progress"]), int(state["lessons"])
        self._statistics, self._network = dict(state["statistics"]), None

    def teaches(self, progress: float) -> bool:
        """Whether a step at a progress in [0, 1] is taught; steps before are followed."""
        return progress >= self._config.teacher_at

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """Take in the weights after a step at a progress in [0, 1]."""
        share = min(1.0, (progress - self._progress) / SPAN)
        self._progress = progress
        torch._foreach_lerp_(list(self._average.values()), list(self._weights().values()), share)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, classes) on training images (B, C, H, W)."""
        if self._network is None:
            # A resumed run makes it once more; new layers draw initial weights, which nobody reads.
            with torch.random.fork_rng([images.device] if images.is_cuda else []):
                self._network = self._whole(images[:1])
        logits: Tensor = self._network(images)
        self._lessons += 1
        if self._lessons == SETTLING:
            current().average_buffers(self._network)
            self._network.eval()
        return logits

    def lesson(self, task: Tensor, logits: Tensor, taught: Tensor, progress: float) -> Tensor:
        """The loss of a taught step, a scalar: (1 - w) task + w T^2 KL(teacher || pupil), both softened by T.

        Args:
            task: loss on the labels, a scalar.
            logits: of the pupil (B, classes).
            taught: of the teacher (B, classes).
            progress: in [0, 1].
        """
        config = self._config
        weight = config.teacher_weight * (1 - progress) / (1 - config.teacher_at)
        soft = config.teacher_temperature
        mine, theirs = (functional.log_softmax(each.float() / soft, 1) for each in (logits, taught))
        divergence = functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)
        return (1 - weight) * task + weight * soft**2 * divergence

    def _weights(self) -> dict[str, Tensor]:
        assert self._model is not None
        of_gates = {id(weight) for gate in find_gates(self._model).values() for weight in gate.parameters()}
        return {name: w.detach() for name, w in self._model.named_parameters() if id(w) not in of_gates}

    def _whole(self, example: Tensor) -> nn.Module:
        """The network of the averaged weights: without gates, nothing cut; images (1, C, H, W) for an example."""
        assert self._model is not None
        gates = find_gates(self._model)
        open_all = {name: gate.running_open_rate.new_ones(gate.num_gates).bool() for name, gate in gates.items()}
        network = freeze_gates(self._model, open_all) if gates else copy.deepcopy(self._model)
        network.load_state_dict(self._average, strict=False)
        network = compact(network.eval(), example) if gates else network.eval()
        for norm in network.modules():
            if isinstance(norm, _Norm):
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean
                norm.train(self._lessons < SETTLING)
        if self._statistics:
            network.load_state_dict(self._statistics, strict=False)
        return network
