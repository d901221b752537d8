"""The method of the paper as one run: dense, gated, consensus, compact, finish. Read `Trainer.run` first."""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack, closing, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv.data import ImageData
from gatedconv.deploy import compact, freeze, re_estimate_batchnorm, save
from gatedconv.environment import provenance
from gatedconv.gating import Consensus, fisher_information, gate_macs, masks_for_target, mean_logits
from gatedconv.train.build import build_model, load_images, phases, starting_network
from gatedconv.train.callbacks import Callback
from gatedconv.train.checkpoint import has_checkpoint, load_checkpoint, read_consensus, restore_part, write_consensus
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.cuda_graph_step import require_graphs
from gatedconv.train.device import mixed_dtype, place, precision_note, resolve_device
from gatedconv.train.distill import FinishedTeacher, Teacher, make_teacher
from gatedconv.train.distributed import SINGLE, Ranks, by_torchrun, process_group
from gatedconv.train.loop import Training
from gatedconv.train.metrics import EpochMetrics, TensorBoard, evaluate, require_tensorboard, run_energy
from gatedconv.train.recipe import closing_note, eval_batches, train_batches
from gatedconv.train.run_dir import MetricsWriter, RunFolder
from gatedconv.train.stopping import StopRequest
from gatedconv.train.summary import example_images, measure_networks, summarize_consensus, write_exports

# MACs that are off the target by more than this share of it, with gates that get no gradient (dead or saturated), are
# worth a note. A single layer gate of ResNet-20 is a fifth of a target of one half.
_TARGET_TOLERANCE = 0.2
# So is a larger share of dead gates that no MAC target explains.
_DEAD_SHARE = 0.5

Networks = dict[str, nn.Module]  # by phase: "dense", "gated", "compact"


def run(
    config: TrainConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    callback: Callback | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Train as `config` sets and write everything to `folder`.

    Under torchrun each process calls this: they train one network together, and the main process writes and reports.
    An existing run in the folder is then resumed: torchrun restarts a job after losing a process, and not every
    process can detect that.

    Args:
        config: of the run.
        folder: a folder without a run, or, with `resume`, that of this one.
        resume: continue from the folder's checkpoints.
        callback: receives the progress.
        stop: ends the run after the current step, with a checkpoint, once a stop is requested.

    Returns:
        The content of summary.json, empty in processes other than the main one; None if `max_minutes` or `stop`
        ended the run early.

    Raises:
        DataError, CheckpointError, ValueError, NonFiniteLoss, OSError: see `Training` and `RunFolder.begin`; files of
            before are kept.
    """
    stop = stop or StopRequest()
    deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else None
    with process_group(config.device) as ranks:
        resume = ranks.agree(resume or (by_torchrun() and folder.holds_run()))
        callback = (callback if ranks.main else None) or Callback()
        if config.threads:
            torch.set_num_threads(config.threads)
        _require_runnable(config, ranks)
        data = load_images(config)
        train_batches(config, data, ranks=ranks)  # raises where the recipe does not fit the data
        # Everything that can refuse the run comes before it creates the folder.
        if config.teacher_file:
            make_teacher(config, data, phases(config)[-1])
        networks = {phase: starting_network(config, data, phase) for phase in phases(config) if phase != "compact"}
        if ranks.main:
            folder.require_startable(resume=resume)
        with folder.locked() if ranks.main else nullcontext():
            if ranks.main:
                folder.begin(config, resume=resume)
            callback.start(config, data)
            return Trainer(config, data, folder, callback, ranks, stop, deadline, resume).run(networks)


def _require_runnable(config: TrainConfig, ranks: Ranks) -> None:
    """Check what the config needs of the machine: devices and packages."""
    device = resolve_device(config.device)
    if config.tensorboard:
        require_tensorboard()
    if config.cuda_graph:
        require_graphs(device, ranks)


class _Stopped(Exception):
    """The run ended early, after a checkpoint."""


class Trainer:
    """One run. It ends after the step in which `deadline`, by `time.monotonic`, passes or a stop is requested."""

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        folder: RunFolder,
        callback: Callback,
        ranks: Ranks = SINGLE,
        stop: StopRequest | None = None,
        deadline: float | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.data, self.folder, self.callback = config, data, folder, callback
        self.ranks, self.stop, self.deadline, self.resume = ranks, stop or StopRequest(), deadline, resume
        self.device = resolve_device(config.device)
        self.teacher: Teacher | FinishedTeacher | None = None
        self.board: TensorBoard | None = None
        self.writer = MetricsWriter(folder.metrics, self._earlier_lines() if resume else ())

    def run(self, networks: Networks) -> dict[str, Any] | None:
        """The run, phase by phase: the summary, or None where it ended early.

        Args:
            networks: with fresh weights, by phase; replaced by the trained ones.
        """
        for note in (precision_note(self.config.amp, self.device), closing_note(self.config)):
            if note:
                self.callback.note(note)
        try:
            with ExitStack() as stack:
                if self.config.tensorboard and self.ranks.main:
                    self.board = stack.enter_context(closing(TensorBoard(self.folder.path / "tensorboard")))
                stack.enter_context(self.stop.deferred())
                if "dense" in networks:
                    self.train("dense", networks["dense"])
                if "gated" in networks:
                    self.train("gated", networks["gated"])
                if self.config.consensus_at < 1:
                    networks["compact"] = self.resumed_compact(networks["gated"]) or self.consensus(networks["gated"])
                    self.train("compact", networks["compact"])
        except _Stopped:
            return None
        if self.ranks.any(self.stop.requested):  # since the last poll
            self.stop.request()
        if "gated" in networks and self.teacher is not None and self.teacher.stepper is not None:
            networks["dense"] = self.teacher.stepper.model
        return self.finish(networks)

    def train(self, phase: str, network: nn.Module) -> None:
        """Train a network in place through the epochs of a phase. Raises _Stopped where the run ends before."""
        self.callback.phase(phase)
        if phase != "compact":  # whose teacher is that of the gated network
            self.teacher = make_teacher(self.config, self.data, phase, self.ranks)
        checkpoint = self.folder.checkpoint(phase)
        training = Training(
            network,
            self.data,
            self.config,
            phase=phase,
            checkpoint=checkpoint,
            on_step=self.callback.step,
            on_note=self.callback.note,
            deadline=self.deadline,
            stop=lambda: self.stop.requested,
            teacher=self.teacher,
        )
        again = self.ranks.agree(self.resume and has_checkpoint(checkpoint))
        last: EpochMetrics | None = None
        for number, metrics in enumerate(training.epochs(again), start=1):
            self._record(metrics, replayed=number <= training.replayed)
            last = metrics
        first, end = epoch_range(self.config, phase)
        done, requested = last.epoch if last else first, self.ranks.any(self.stop.requested)
        if requested or done < end:
            why = "a stop was requested" if requested else f"max_minutes is {self.config.max_minutes:g}"
            self.callback.note(
                f"stopped after {done} of {self.config.epochs} epochs ({phase}): {why}; resume with: "
                f"gatedconv train --resume {self.folder.path}"
            )
            raise _Stopped
        if last is not None:
            self._note_dead_gates(last)

    def consensus(self, gated: nn.Module) -> nn.Module:
        """Let the gates agree by a pass over the train split, write consensus.json, and compact; a collective.

        With `consensus_by` "vote" the majority of the samples decides, else the gates that rank highest stay open, as
        many as `mac_target` allows. Agreement is the share of samples whose gates equal the masks in both cases.
        Warnings of `freeze` become notes.
        """
        config, data, ranks = self.config, self.data, self.ranks
        masks = None if config.consensus_by == "vote" else ranks.agree(self._ranked_masks(gated))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            frozen = freeze(gated, eval_batches(config, data, "train", ranks), masks=masks)
        for warning in caught:
            self.callback.note(str(warning.message))
        _, top1 = evaluate(gated, eval_batches(config, data, ranks=ranks), ranks)
        if ranks.main:
            found = frozen.consensus
            assert isinstance(found, Consensus)  # for the type checker: nn.Module's attributes have no types
            write_consensus(self.folder.consensus, found, summarize_consensus(gated, found, top1))
        return self.compacted(frozen)

    def resumed_compact(self, gated: nn.Module) -> nn.Module | None:
        """The compact network of the consensus before an interruption; None without a checkpoint of it."""
        if not self.ranks.agree(self.resume and has_checkpoint(self.folder.checkpoint("compact"))):
            return None
        consensus, _ = self.ranks.agree(read_consensus(self.folder.consensus) if self.ranks.main else None)
        return self.compacted(refrozen(gated, consensus))

    def compacted(self, frozen: nn.Module) -> nn.Module:
        """Compact a frozen network; re-estimate BatchNorm statistics if configured. A collective."""
        self._re_estimate(frozen)
        # On a GPU, `compact` pads channels for the matrix units by default: more MACs than were agreed on.
        return compact(frozen.eval(), example_images(self.data, self.config, 1), channel_multiple=1)

    def finish(self, networks: Networks) -> dict[str, Any]:
        """Freeze, compact, measure, save and export trained networks; returns and writes the summary.

        Empty in processes other than the main one.
        """
        self.callback.phase("finish")
        started, config, data = time.monotonic(), self.config, self.data
        if "compact" in networks:
            self._re_estimate(networks["compact"])
        elif "gated" in networks:
            networks = networks | {"compact": self.consensus(networks["gated"])}
        if "dense" in networks:
            self._re_estimate(networks["dense"])
        if not self.ranks.main:
            return {}
        files = self._write_models(networks)  # first: measuring takes long, and can fail
        outcome = measure_networks(networks, config, data, self.folder)
        history = self.folder.read_metrics()
        energy = run_energy(history)
        summary = {
            "name": config.name,
            "model": config.model,
            "gate": config.gate,
            "data": config.data,
            "images": {"classes": list(data.class_names), "mean": list(data.mean), "std": list(data.std)},
            "evaluated_on": config.evaluate_on,
            "seed": config.seed,
            "epochs": {phase: sum(line.phase == phase for line in history) for phase in phases(config)},
            **outcome,
            **({"exports": files} if "gated" in networks else {}),
            "taught": config.teacher_at < 1 and {"dense", "gated"} <= networks.keys(),  # then "dense" is the teacher
            "energy_j": energy.joules,
            "energy_source": energy.source,
            "energy_reason": energy.reason or None,
            "amp": {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[mixed_dtype(config.amp, self.device)],
            "train_macs": sum(line.train_macs for line in history),
            "wall_s": round(sum(line.seconds for line in history) + time.monotonic() - started, 2),
            **provenance(self.device),
        }
        self.folder.write_summary(summary)
        return summary

    def load(self) -> Networks:
        """The networks of a run from its newest checkpoints, whether or not it is finished.

        Raises:
            CheckpointError: no checkpoint, a damaged one, or one of another model.
        """
        config, data, networks = self.config, self.data, Networks()
        for phase in phases(config):
            path = self.folder.checkpoint(phase)
            if not has_checkpoint(path) and phase != "gated":
                continue
            if phase == "compact":
                network = self.compacted(refrozen(networks["gated"], read_consensus(self.folder.consensus)[0]))
            else:
                network = starting_network(config, data, phase)
            state = load_checkpoint(path, self.callback.note)
            restore_part(state, path, "model", network)
            networks[phase] = place(network, config)
            if "gated" in networks and "model" in state.get("teacher", ()):
                dense = build_model(config, data, gated=False)
                restore_part(state["teacher"], path, "model", dense)
                networks["dense"] = place(dense, config)
        return networks

    def _write_models(self, networks: Networks) -> list[str]:
        """Save every network, and export the compact one of a gated run; the names of the exported files."""
        for phase, network in networks.items():
            save(network.eval(), self.folder.model(phase))
        if "gated" not in networks:
            return []
        one = example_images(self.data, self.config, 1)
        return write_exports(networks["compact"].eval(), one, self.folder.path, self.callback.note)

    def _ranked_masks(self, gated: nn.Module) -> dict[str, Tensor]:
        """Masks of the gates that rank highest over the train split, each process with its share of it."""
        config, data, ranks = self.config, self.data, self.ranks
        if config.consensus_by == "logit":
            scores = mean_logits(gated, eval_batches(config, data, "train", ranks))
        else:
            batches = train_batches(config, data, ranks=ranks)
            information, costs = fisher_information(gated, batches, F.cross_entropy), gate_macs(gated)
            scores = {name: value / costs[name] for name, value in information.items()}
        return masks_for_target(gated, scores, config.mac_target)

    def _re_estimate(self, network: nn.Module) -> None:
        """Re-estimate BatchNorm statistics if configured, each process over its share of the batches; a collective."""
        if self.config.bn_reestimate:
            batches = train_batches(self.config, self.data, ranks=self.ranks)
            count = -(-self.config.bn_images // self.config.batch_size) or None
            re_estimate_batchnorm(network, islice(batches, count))

    def _record(self, metrics: EpochMetrics, *, replayed: bool) -> None:
        """Write and report the metrics of an epoch, or of one that was read from a checkpoint."""
        if self.ranks.main:
            self.writer.write(metrics)
        if self.board is not None and (self.board.empty or not replayed):
            self.board.write(metrics)
        (self.callback.replay if replayed else self.callback.epoch)(metrics)

    def _earlier_lines(self) -> list[EpochMetrics]:
        """The lines of metrics.jsonl; none if it is damaged: it is written again from the checkpoints."""
        try:
            return self.folder.read_metrics()
        except ValueError:
            return []

    def _note_dead_gates(self, last: EpochMetrics) -> None:
        """Note gates without a gradient where the MACs are not as configured."""
        if last.macs is None:
            return
        if self.config.mac_weight or self.config.mac_control != "none":
            stuck, target = last.gates_saturated == last.num_gates, self.config.mac_target
            if stuck and abs(last.macs / target - 1) > _TARGET_TOLERANCE:
                self.callback.note(
                    f"all {last.num_gates} gates are saturated at {last.macs:.1%} of the dense MACs, "
                    f"mac_target is {target:.1%}: a longer gate_warmup or a higher mac_weight may help"
                )
        elif last.gates_dead / last.num_gates > _DEAD_SHARE:
            self.callback.note(
                f"{last.gates_dead} of {last.num_gates} gates are dead, closed for every image, at {last.macs:.1%} of "
                "the dense MACs; mac_target with mac_weight or mac_control sets how much is pruned"
            )


def refrozen(gated: nn.Module, consensus: Consensus) -> nn.Module:
    """The frozen network of a consensus that was read from its file: the vote is not repeated."""
    frozen = freeze(gated, masks=consensus.masks)
    vars(frozen)["consensus"] = consensus
    return frozen
