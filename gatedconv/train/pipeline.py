"""One run, from a config to a folder: train, freeze, cut, measure, save."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gatedconv.data import ImageData
from gatedconv.environment import provenance
from gatedconv.train.build import build_model, load_images, phases, starting_network
from gatedconv.train.captured import require_graphs
from gatedconv.train.checkpoint import has_checkpoint, load_checkpoint
from gatedconv.train.config import TrainConfig, epoch_range
from gatedconv.train.consensus import freeze_again
from gatedconv.train.distributed import Ranks, by_torchrun, current, joined
from gatedconv.train.energy import of_run
from gatedconv.train.finish import agree, cut_out, finish
from gatedconv.train.folder import MetricsWriter, RunFolder
from gatedconv.train.listener import Listener
from gatedconv.train.loop import train
from gatedconv.train.masks import read_consensus
from gatedconv.train.metrics import EpochMetrics
from gatedconv.train.recipe import mixed_dtype, place, resolve_device, train_batches
from gatedconv.train.state import restore_part
from gatedconv.train.stopping import StopRequest
from gatedconv.train.teacher import Teacher, teacher_of
from gatedconv.train.tensorboard import TensorBoard, require_tensorboard

# Gates that are all stuck further than this from the wanted MACs, relatively, deserve a word. A single layer
# gate of ResNet-20 is a fifth of a target of one half.
_TARGET_TOLERANCE = 0.2
# As does a larger share of dead gates than this: without a MAC target, nobody may have asked for so much.
_DEAD_SHARE = 0.5


def run(
    config: TrainConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Train what `config` asks for and write everything to `folder`.

    Started by torchrun, each process calls this: they train one network together, and the first of them writes
    and reports. There, a folder that holds this run already is gone on with: torchrun starts a job again after
    losing a process, and whether it has done so not every process of it can tell.

    Args:
        config: the run.
        folder: a folder that holds no run yet, or, with `resume`, this one.
        resume: go on where the folder's checkpoints stand.
        listener: hears of progress.
        stop: once made, ends the run after the step that is being made, with a checkpoint.

    Returns:
        The content of summary.json, empty in other processes than the first; None if `max_minutes` or `stop`
        ended the run early.

    Raises:
        DataError, CheckpointError, ValueError, NonFiniteLoss, OSError: see `train` and `RunFolder.begin`;
            whatever was on the disk before stays there.
    """
    stop = stop or StopRequest()
    with joined(config.device) as ranks:
        again = ranks.agree(resume or (by_torchrun() and folder.holds_run()))
        return _run(config, folder, again, (listener if ranks.main else None) or Listener(), stop, ranks)


def _run(
    config: TrainConfig, folder: RunFolder, resume: bool, listener: Listener, stop: StopRequest, ranks: Ranks
) -> dict[str, Any] | None:
    deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else None
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.tensorboard:
        require_tensorboard()
    device = resolve_device(config.device)
    if config.cuda_graph:
        require_graphs(device, ranks)
    data = load_images(config)
    train_batches(config, data, ranks=ranks)  # raises where the recipe does not fit the data
    networks = {phase: starting_network(config, data, phase) for phase in phases(config) if phase != "cut"}
    # A run that is refused has claimed no folder: everything that can refuse it comes before.
    with folder.claimed() if ranks.main else nullcontext():
        if ranks.main:
            folder.begin(config, resume=resume)
        listener.start(config, data)
        trained = _train_phases(config, data, folder, networks, resume, listener, deadline, stop)
        if trained is None:
            return None
        if stop.made:  # after the last time that anybody looked
            stop.make()
        if not ranks.main:
            finish(config, data, folder, trained, listener)
            return {}
        return conclude(config, data, folder, trained, listener)


def conclude(
    config: TrainConfig, data: ImageData, folder: RunFolder, trained: dict[str, nn.Module], listener: Listener
) -> dict[str, Any]:
    """Freeze, cut and measure trained networks, and write summary.json; returns its content."""
    listener.phase("finish")
    started, device = time.monotonic(), resolve_device(config.device)
    outcome = finish(config, data, folder, trained, listener)
    history = folder.read_metrics()
    energy = of_run(history)
    summary = {
        "name": config.name,
        "model": config.model,
        "gate": config.gate,
        "data": config.data,
        "evaluated_on": config.evaluate_on,
        "seed": config.seed,
        "epochs": {phase: sum(line.phase == phase for line in history) for phase in phases(config)},
        **outcome,
        "taught": config.teacher_at < 1 and {"dense", "gated"} <= trained.keys(),  # then "dense" is the teacher
        "energy_j": energy.joules,
        "energy_source": energy.source,
        "energy_reason": energy.reason or None,
        "amp": {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[mixed_dtype(config, device)],
        "train_macs": sum(line.train_macs for line in history),
        "wall_s": round(sum(line.seconds for line in history) + time.monotonic() - started, 2),
        **provenance(device),
    }
    folder.write_summary(summary)
    return summary


def load_trained(folder: RunFolder, config: TrainConfig, data: ImageData, listener: Listener) -> dict[str, nn.Module]:
    """The networks of a run as its newest checkpoints have them, whether or not it was finished.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of another model.
    """
    trained: dict[str, nn.Module] = {}
    for phase in phases(config):
        path = folder.checkpoint(phase)
        if has_checkpoint(path) or phase == "gated":
            if phase == "cut":
                consensus, _ = read_consensus(folder.consensus)
                network = cut_out(freeze_again(trained["gated"], consensus), config, data)
            else:
                network = starting_network(config, data, phase)
            state = load_checkpoint(path, listener.note)
            restore_part(state, path, "model", network)
            trained[phase] = place(network, config)
            if "gated" in trained and "model" in state.get("teacher", ()):  # the whole network, which taught
                whole = build_model(config, data, gated=False)
                restore_part(state["teacher"], path, "model", whole)
                trained["dense"] = place(whole, config)
    return trained


def _train_phases(
    config: TrainConfig,
    data: ImageData,
    folder: RunFolder,
    networks: dict[str, nn.Module],
    resume: bool,
    listener: Listener,
    deadline: float | None,
    stop: StopRequest,
) -> dict[str, nn.Module] | None:
    ranks = current()
    writer = MetricsWriter(folder.metrics, _earlier_lines(folder) if resume else ())
    trained: dict[str, nn.Module] = {}
    teacher: Teacher | None = None
    board_wanted = config.tensorboard and ranks.main
    whole = networks | {"cut": None} if config.consensus_at < 1 else networks
    with TensorBoard(folder.path / "tensorboard") if board_wanted else nullcontext() as board, stop.patiently():
        for phase, network in whole.items():
            listener.phase(phase)
            checkpoint = folder.checkpoint(phase)
            last = None
            again = ranks.agree(resume and has_checkpoint(checkpoint))
            if phase != "cut":  # which is taught by what it was cut from
                teacher = teacher_of(config, data, phase, ranks)
            if network is None:
                network = _cut_network(config, data, folder, trained["gated"], again, listener)
            for metrics in train(
                network,
                data,
                config,
                phase=phase,
                checkpoint=checkpoint,
                resume=again,
                on_step=listener.step,
                on_note=listener.note,
                deadline=deadline,
                stop=lambda: stop.made,
                teacher=teacher,
            ):
                if ranks.main:
                    writer.write(metrics)
                if board is not None:
                    board.write(metrics)
                listener.epoch(metrics)
                if _dead_share(metrics) > _DEAD_SHARE >= _dead_share(last):
                    listener.note(_dead_note(metrics))
                last = metrics
            begin, end = epoch_range(config, phase)
            done, asked = last.epoch if last else begin, ranks.any(stop.made)
            if asked or done < end:
                why = "asked to stop" if asked else f"max_minutes is {config.max_minutes:g}"
                listener.note(
                    f"stopped after {done} of {config.epochs} epochs ({phase}): {why}; go on with: "
                    f"gatedconv train --resume {folder.path}"
                )
                return None
            if last is not None:
                _note_stuck_gates(config, last, listener)
            trained[phase] = network
    if "gated" in trained and teacher is not None and teacher.stepper is not None:
        trained["dense"] = teacher.stepper.model
    return trained


def _earlier_lines(folder: RunFolder) -> list[EpochMetrics]:
    """What metrics.jsonl tells; nothing if it is damaged: the checkpoints know it better."""
    try:
        return folder.read_metrics()
    except ValueError:
        return []


def _cut_network(
    config: TrainConfig, data: ImageData, folder: RunFolder, gated: nn.Module, resume: bool, listener: Listener
) -> nn.Module:
    """What the gates agree on, cut out to be trained on; a resumed run keeps the consensus that it had."""
    ranks = current()
    if resume:
        consensus, _ = ranks.agree(read_consensus(folder.consensus) if ranks.main else None)
        return cut_out(freeze_again(gated, consensus), config, data)
    return agree(gated, config, data, folder, listener, ranks)


def _dead_share(metrics: EpochMetrics | None) -> float:
    return metrics.gates_dead / metrics.num_gates if metrics and metrics.num_gates else 0.0


def _dead_note(metrics: EpochMetrics) -> str:
    return (
        f"epoch {metrics.epoch}: {metrics.gates_dead} of {metrics.num_gates} gates are dead: shut beyond the "
        f"estimator's window for a whole batch, so that nothing opens them again (MACs {metrics.macs:.1%})"
    )


def _note_stuck_gates(config: TrainConfig, last: EpochMetrics, listener: Listener) -> None:
    """Say so when nothing could move the gates any more and the MACs are not what was asked for."""
    stuck = last.num_gates > 0 and last.gates_saturated == last.num_gates
    if stuck and config.mac_weight and abs(last.macs / config.mac_target - 1) > _TARGET_TOLERANCE:
        listener.note(
            f"all {last.num_gates} gates are saturated at {last.macs:.1%} of the dense MACs, "
            f"mac_target is {config.mac_target:.1%}: a longer gate_warmup or a higher mac_weight may help"
        )
