"""Arms of the search for a stronger method: each changes one thing in how a run of the recipe prunes.

    python -m reproduce.method_arms BENCH ARM SEED --data PATH --runs DIR --results FILE

Every arm is judged on held-out training images. All arms of a bench and seed share the epochs before the first gate
closes: they are trained once, and copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.data import EvalBatches
from gatedconv.environment import provenance
from gatedconv.gating import GatePruner
from gatedconv.gating.pruner import CLOSED_LOGIT, EVERY
from gatedconv.train import recipe, step
from gatedconv.train.build import load_images
from gatedconv.train.callbacks import Callback
from gatedconv.train.config import TrainConfig, make_config
from gatedconv.train.metrics import EpochMetrics
from gatedconv.train.presets import preset_settings
from gatedconv.train.run_dir import RunFolder
from gatedconv.train.step import Buffers, Stepper, StepResult
from gatedconv.train.stopping import StopRequest
from gatedconv.train.trainer import run

BENCHES: dict[str, dict[str, Any]] = {
    "fast": preset_settings("fast-c10"),
    "small": preset_settings("best-c10-r20")
    | {"epochs": 24, "warmup_epochs": 1.0, "mac_target": 0.5, "teacher_at": 1.0},
}
TIMES: dict[str, dict[str, Any]] = {  # of the fast bench, whose last gate closes at 48 % of the run
    "earlier": {"mac_ramp": (0.1, 0.28), "consensus_at": 0.3},
    "later": {"mac_ramp": (0.5, 0.68), "consensus_at": 0.7},
}
GROUPS = 8  # candidates for removal of a gate: an eighth of its channels each
IMAGES = 1024  # training images on which a removal is measured, without augmentation


class Measured(GatePruner):
    """Greedy: closes the group of channels, or the whole block, whose measured loss rises least per MAC.

    The order within a gate is the recipe's. The loss is that of training images with the norms' statistics of those.
    """

    images: Tensor
    labels: Tensor
    forwards = 0

    @torch.no_grad()
    def prune(self, target: float) -> None:
        """Close candidates until the MACs are at most ``target`` of the dense model's."""
        self._reached = target
        full = self._macs(torch.ones_like(self.sensitivity))
        while self._macs((~self.pruned).float()) > target * full:
            macs, loss = self._macs((~self.pruned).float()), self._loss(self.pruned)
            found = []
            for candidate in self._candidates():
                mask = self.pruned.clone()
                mask[candidate] = True
                left = self._macs((~mask).float())
                # A whole block may go below the target of now, but not below that of the end.
                if left >= (self.final - 0.01) * full or len(candidate) == 1:
                    found.append(((self._loss(mask) - loss) / (macs - left), candidate))
            best = min(found, key=lambda pair: pair[0])[1] if found else self._candidates()[0][:1]
            for gate in best:
                if self._macs((~self.pruned).float()) <= target * full and len(best) <= self._group(best):
                    break
                self.pruned[gate] = True
        self._close(self.pruned)

    def _group(self, candidate: Tensor) -> int:
        ends = torch.tensor(self._sizes).cumsum(0)
        return max(1, self._sizes[int((ends <= candidate[0]).sum())] // GROUPS)

    def _candidates(self) -> list[Tensor]:
        """Of each gate the next group to close, as indices, and everything that is open, if that is more."""
        found, start = [], 0
        for size in self._sizes:
            part = slice(start, start + size)
            order = self.sensitivity[part].masked_fill(self.pruned[part], torch.inf).argsort()
            order = order[: int((~self.pruned[part]).sum())] + start
            group = order[: max(1, size // GROUPS)]
            if len(order) > len(group) or (len(order) and self.blocks):
                found.append(group)
            if self.blocks and len(order) > len(group):
                found.append(order)
            start += size
        return found

    def _loss(self, pruned: Tensor) -> float:
        model, kept = self._pruned_model(), [parameter.clone() for parameter in self._layers()]
        buffers = Buffers(model)
        self._close(pruned)
        with torch.autocast("cpu", torch.bfloat16):
            loss = recipe.task_loss(model(self.images), self.labels)
        buffers.restore()
        for parameter, value in zip(self._layers(), kept, strict=True):
            parameter.copy_(value)
        self.forwards += len(self.images)
        return float(loss)

    def _layers(self) -> Iterator[nn.Parameter]:
        for gate in self._gates.values():
            yield from (gate.fc2.weight, gate.fc2.bias)

    def _close(self, pruned: Tensor) -> None:
        for learned, mask in zip(self._gates.values(), pruned.split(self._sizes), strict=True):
            learned.fc2.weight.masked_fill_(mask[:, None], 0)
            learned.fc2.bias.masked_fill_(mask, CLOSED_LOGIT)


class Reopening(GatePruner):
    """Ranks all gates anew each time, those that are closed, too: they learn on in the dense pass."""

    @torch.no_grad()
    def prune(self, target: float) -> None:
        """Close those that rank lowest, and open the others, so that the MACs are at most ``target``."""
        self._reached = target
        before = self.pruned.clone()
        self.pruned.zero_()
        full = self._macs(torch.ones_like(self.sensitivity))
        for gate in self._scores(self.sensitivity).argsort(stable=True).tolist():
            if self._macs((~self.pruned).float()) <= target * full:
                break
            self.pruned[gate] = True
        masks = zip(self.pruned.split(self._sizes), (before & ~self.pruned).split(self._sizes), strict=True)
        for learned, (closed, opened) in zip(self._gates.values(), masks, strict=True):
            learned.fc2.weight.masked_fill_((closed | opened)[:, None], 0)
            learned.fc2.bias.masked_fill_(closed, CLOSED_LOGIT).masked_fill_(opened, 1.0)


@contextmanager
def everything_open(pruner: GatePruner) -> Iterator[None]:
    """Context in which every gate is open; gates get no gradient, since their logits are far from 0."""
    gates = [gate.fc2 for gate in pruner._gates.values()]
    kept = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in gates]
    with torch.no_grad():
        for layer in gates:
            layer.weight.zero_()
            layer.bias.fill_(10.0)
    yield
    with torch.no_grad():
        for layer, (weight, bias) in zip(gates, kept, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


_forward_backward = Stepper._forward_backward


def two_passes(self: Stepper, images: Tensor, labels: Tensor, progress: float, teacher: Tensor | None) -> StepResult:
    """A step of shared weights: the open network learns from the labels, the pruned one from it and the labels."""
    if self.pruner is None or progress < self.config.mac_ramp[0]:
        return _forward_backward(self, images, labels, progress, teacher)
    self.optimizer.zero_grad(set_to_none=True)
    sensitivity = self.pruner.sensitivity
    before = sensitivity.clone()
    with everything_open(self.pruner):
        with self.autocast:
            whole = self.network(images)
        self.skipping.note_forward(len(images))
        (0.5 * recipe.task_loss(whole, labels, self.config.label_smoothing)).backward()
    of_whole = sensitivity.clone()
    sensitivity.copy_(before)
    with self.autocast:
        logits = self.network(images)
    self.skipping.note_forward(len(images))
    task = recipe.task_loss(logits, labels, self.config.label_smoothing)
    of_gates, polar = recipe.gate_loss(self.model, self.config, self._loss_weights(progress))
    total = 0.5 * recipe.distillation_loss(task, logits, whole, self.config) + of_gates
    total.backward()
    if isinstance(self.pruner, Reopening):
        sensitivity.copy_(of_whole)
    return StepResult(logits.detach(), total.detach(), polar.detach(), self._add_rates(None, 1.0))


class Pull:
    """Shrinks the weights behind gates that are about to close, by a tenth in each of the steps before."""

    def __init__(self) -> None:
        self.soon: Tensor | None = None

    @torch.no_grad()
    def __call__(self, pruner: GatePruner, options: TrainConfig, progress: float) -> None:
        """In place of `recipe.prune_gates`."""
        if progress < options.mac_ramp[0]:
            return
        if self.soon is not None:
            modules = dict(pruner._pruned_model().named_modules())
            for name, mask in zip(pruner._gates, self.soon.split(pruner._sizes), strict=True):
                modules[name.rpartition(".")[0] + ".conv2"].weight[:, mask] *= 0.9
        pruner.step(recipe.mac_share_at(options, progress))
        if self.soon is None or pruner._steps % EVERY == 0:
            self.soon = self._next(pruner, recipe.mac_share_at(options, progress + EVERY / self.steps))

    def _next(self, pruner: GatePruner, target: float) -> Tensor:
        would = pruner.pruned.clone()
        full = pruner._macs(torch.ones_like(pruner.sensitivity))
        for gate in pruner._scores(pruner.sensitivity).masked_fill(would, torch.inf).argsort(stable=True).tolist():
            if pruner._macs((~would).float()) <= target * full:
                break
            would[gate] = True
        return would & ~pruner.pruned

    steps: int


def prepare(arm: str, bench: str, config: TrainConfig) -> Callable[[], int]:
    """Change the method as the arm says; returns what counts images that the trainer does not."""
    made: list[GatePruner] = []

    def make(kind: Callable[[nn.Module], GatePruner]) -> None:
        def make_pruner(model: nn.Module, options: Any, *_: object) -> GatePruner | None:
            if options.mac_control != "rank" or not any(True for _ in recipe.find_gates(model)):
                return None
            made.append(kind(model))
            return made[-1]

        step.make_pruner = make_pruner  # type: ignore[assignment]

    if arm == "even":
        make(lambda model: GatePruner(model, even=True))
    if arm.startswith("measured"):
        data = load_images(config)
        images, labels = next(iter(EvalBatches(data, "train", batch_size=IMAGES)))
        Measured.images, Measured.labels = images.to(memory_format=torch.channels_last), labels
        Measured.final, Measured.blocks = config.mac_target, bench == "small"  # type: ignore[attr-defined]
        make(Measured)
    if arm.startswith("shared"):
        Stepper._forward_backward = two_passes  # type: ignore[method-assign]
        if arm == "shared-reopening":
            make(Reopening)
    if arm == "pull":
        pull = Pull()
        pull.steps = config.epochs * (len(load_images(config).train_images) // config.batch_size)
        step.prune_gates = pull
    return lambda: sum(getattr(pruner, "forwards", 0) for pruner in made)


class Until(Callback):
    """Requests a stop after an epoch, and prints epochs."""

    def __init__(self, stop: StopRequest, last: int) -> None:
        self.stop, self.last = stop, last

    def epoch(self, metrics: EpochMetrics) -> None:
        """Print a line."""
        print(metrics.phase, metrics.epoch, f"{metrics.train_loss:.3f} {metrics.test_top1:.2f}", flush=True)
        if metrics.epoch == self.last:
            self.stop.request()


def main() -> None:
    """Train an arm and add its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", choices=tuple(BENCHES))
    parser.add_argument("arm")
    parser.add_argument("seed", type=int)
    for name in ("--data", "--runs", "--results"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    where = {"name": "", "data": f"npz:{options.data}", "evaluate_on": "val", "seed": options.seed, "threads": 1}
    where |= {"latency": False, "device": "cpu", "amp": "bf16", "shared_device": True}
    settings = BENCHES[options.bench] | where | TIMES.get(options.arm, {})
    config = make_config(settings, where=options.bench)
    runs, stop = Path(options.runs), StopRequest()
    folder = RunFolder(runs / f"{options.bench}-{options.arm}-{options.seed}")
    shared = int(config.mac_ramp[0] * config.epochs + 1e-9)
    if options.arm not in TIMES and not folder.holds_run():
        common = RunFolder(runs / f"{options.bench}-common-{options.seed}")
        if len(common.read_metrics()) < shared:
            run(config, common, resume=common.holds_run(), callback=Until(stop, shared), stop=stop)
        shutil.copytree(common.path, folder.path)
    extra = prepare(options.arm, options.bench, config)
    summary = run(config, folder, resume=folder.holds_run(), callback=Until(StopRequest(), -1))
    assert summary is not None
    row = {
        "bench": options.bench,
        "arm": options.arm,
        "seed": options.seed,
        "top1": summary["frozen"]["top1"],
        "macs_share": summary["frozen"]["macs"] / summary["macs_dense"],
        "agreement": summary["agreement"],
        "open_rates": summary["open_rates"],
        "train_macs": summary["train_macs"] + extra() * summary["macs_dense"],
        "commit": provenance(torch.device("cpu"))["commit"],
    }
    with open(options.results, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(row)


if __name__ == "__main__":
    main()
