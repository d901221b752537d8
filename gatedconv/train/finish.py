"""After training: the gates agree, the rest is cut out, and what is left is measured."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.data import EvalBatches, ImageData
from gatedconv.deploy import compact, export, save
from gatedconv.engine import Engine
from gatedconv.measure.energy import EnergyMeter, energy_per_call
from gatedconv.measure.latency import block_figures, measure_latency
from gatedconv.measure.macs import conv_macs, count_macs_by_operator
from gatedconv.train.build import build_model
from gatedconv.train.config import TrainConfig
from gatedconv.train.consensus import consensus_figures, settle
from gatedconv.train.distributed import ALONE, Ranks, current
from gatedconv.train.folder import RunFolder
from gatedconv.train.listener import Listener
from gatedconv.train.masks import read_consensus, write_consensus
from gatedconv.train.metrics import evaluate
from gatedconv.train.recipe import placement, train_batches

LATENCY_BATCHES = (1, 32)
_NO_ENERGY: dict[str, Any] = {"energy_j": None, "energy_j_image": None}
_EXPORTS = {"onnx": "compact.onnx", "torch": "compact.pt2"}


def finish(
    config: TrainConfig, data: ImageData, folder: RunFolder, trained: dict[str, nn.Module], listener: Listener
) -> dict[str, Any]:
    """Freeze, cut, measure, save and export what a run has trained.

    Args:
        config: of the run.
        data: of the run.
        folder: where models are written.
        trained: "dense", "gated" or both, as training left them, and "cut" where the consensus came before the end.
        listener: hears notes.

    Returns:
        The outcome: `dense` and `frozen` with top1 (percent), macs, params, latency_ms and energy, and, for a gated
        run, agreement, open rates, pruning rate (eq. 11) and the network's figures before the freeze.
    """
    nets: dict[str, nn.Module] = {}
    outcome: dict[str, Any] = {}
    ranks = current()
    if "gated" in trained and "cut" not in trained:
        trained = trained | {"cut": agree(trained["gated"], config, data, folder, listener, ranks)}
    elif "cut" in trained:
        _reestimate_if_asked(config, data, trained["cut"])
    if not ranks.main:
        return {}
    if "dense" in trained:
        nets["dense"] = trained["dense"]
        _reestimate_if_asked(config, data, nets["dense"])
    if "gated" in trained:
        nets["frozen"] = trained["cut"]
        outcome |= read_consensus(folder.consensus)[1]
        dense = build_model(config, data, gated=False)
        outcome["macs_conv_dense"] = conv_macs(count_macs_by_operator(dense, torch.zeros(1, *data.image_shape)))
        save(trained["gated"], folder.model("gated"))
    for name, net in nets.items():
        outcome[name] = figures(net.eval(), config, data)
        save(net, folder.model("compact" if name == "frozen" else name))
    alone = config.latency and not config.shared_device
    if alone:
        for name, times in latencies(nets, config, data).items():
            outcome[name] |= times
    for name, net in nets.items():
        outcome[name] |= energies(net, config, data) if alone else _NO_ENERGY
    if "frozen" in nets:
        masks, one = read_consensus(folder.consensus)[0].masks, example_images(data, config, 1)
        outcome["blocks"] = block_figures(nets["frozen"], masks, one, rounds=9 if alone else 0)
        outcome["exports"] = write_exports(nets["frozen"], config, data, folder, listener)
    return outcome


def agree(
    gated: nn.Module, config: TrainConfig, data: ImageData, folder: RunFolder, listener: Listener, ranks: Ranks = ALONE
) -> nn.Module:
    """The network that the gates agree on, cut; what they agreed on goes to consensus.json. A collective."""
    frozen, consensus = settle(gated, config, data, listener, ranks)
    _, top1 = evaluate(gated, _test_batches(config, data, ranks), ranks)
    if ranks.main:
        found = consensus_figures(gated, consensus, top1)
        write_consensus(folder.consensus, consensus, found)
    return cut_out(frozen, config, data)


def cut_out(frozen: nn.Module, config: TrainConfig, data: ImageData) -> nn.Module:
    """A frozen network without what is closed, its BatchNorm statistics worked out again if `config` says so."""
    _reestimate_if_asked(config, data, frozen)
    # On a GPU, `compact` would by itself fill channels up for the matrix units: more MACs than were agreed on.
    return compact(frozen.eval(), example_images(data, config, 1), channel_multiple=1)


def figures(net: nn.Module, config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Top-1 (percent) on the test split, MACs per image (fvcore's count, and without norms) and parameters."""
    operators = count_macs_by_operator(net, example_images(data, config, 1))
    return {
        "top1": round(evaluate(net, _test_batches(config, data))[1], 4),
        "macs": sum(operators.values()),
        "macs_conv": conv_macs(operators),
        "params": sum(parameter.numel() for parameter in net.parameters()),
    }


def latencies(
    nets: dict[str, nn.Module], config: TrainConfig, data: ImageData
) -> dict[str, dict[str, dict[str, float]]]:
    """Median ms of one call at batch 1 and 32, all networks and their engines measured in turns.

    Returns:
        {name: {"latency_ms": {"1": ms, "32": ms}}} of PyTorch's eager mode, and beside it
        "engine_latency_ms" where our engine runs the network natively.
    """
    times: dict[str, dict[str, dict[str, float]]] = {name: {} for name in nets}
    for batch in LATENCY_BATCHES:
        images = example_images(data, config, batch)
        candidates: dict[tuple[str, str], nn.Module] = {(name, "latency_ms"): net for name, net in nets.items()}
        if images.device.type == "cpu":
            engines = {(name, "engine_latency_ms"): Engine(net, images) for name, net in nets.items()}
            candidates |= {key: engine for key, engine in engines.items() if engine.plans}
        for (name, runtime), latency in measure_latency(candidates, images).items():
            times[name].setdefault(runtime, {})[str(batch)] = round(latency.median, 4)
    return times


def energies(net: nn.Module, config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Joules in eager mode: of one call at batch 1 and 32, and of an image of the larger batch.

    Returns:
        {"energy_j": {"1": J, "32": J}, "energy_j_image": J}; None in place of what the machine does not tell.
    """
    found: dict[str, float | None] = {}
    for batch in LATENCY_BATCHES:
        images = example_images(data, config, batch)
        meter = EnergyMeter(images.device)
        if meter.reason:
            return _NO_ENERGY
        wait = torch.cuda.synchronize if images.is_cuda else None
        found[str(batch)] = energy_per_call(partial(net, images), meter, synchronize=wait)
    largest = max(LATENCY_BATCHES)
    whole = found[str(largest)]
    return {"energy_j": found, "energy_j_image": None if whole is None else whole / largest}


def write_exports(
    net: nn.Module, config: TrainConfig, data: ImageData, folder: RunFolder, listener: Listener
) -> list[str]:
    """Export the cut network to every format whose packages are installed; returns the file names."""
    written = []
    for kind, name in _EXPORTS.items():
        try:
            export(net, folder.path / name, example_images(data, config, 1), format=kind)
        except ImportError as error:
            listener.note(f"{name} not written: {error}")
        else:
            written.append(name)
    return written


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Work out BatchNorm's running statistics again, as plain means over `batches`; the mode is put back.

    The running statistics of training remember sub-networks that are gone. Nothing else changes.

    Args:
        model: a network whose weights are final.
        batches: (images, labels), as in training.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for images, _ in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


def example_images(data: ImageData, config: TrainConfig, batch: int) -> Tensor:
    """The first `batch` test images, normalised, on the run's device; repeated if there are too few."""
    return _test_batches(config, data).first(batch)


def _reestimate_if_asked(config: TrainConfig, data: ImageData, net: nn.Module) -> None:
    if config.bn_reestimate:
        reestimate_batchnorm(net, train_batches(config, data))


def _test_batches(config: TrainConfig, data: ImageData, ranks: Ranks = ALONE) -> EvalBatches:
    return EvalBatches(data, "test", **placement(config), rank=ranks.rank, world=ranks.world)
