"""After training: the gates agree, the rest is cut out, and what is left is measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.data import EvalBatches, ImageData
from gatedconv.deploy import Consensus, Engine, compact, count_macs, export, freeze, save
from gatedconv.deploy.latency import measure_latency
from gatedconv.gates import expected_macs, pruning_rate
from gatedconv.train.config import TrainConfig
from gatedconv.train.distributed import ALONE, Ranks, current
from gatedconv.train.folder import RunFolder
from gatedconv.train.listener import Listener
from gatedconv.train.metrics import evaluate
from gatedconv.train.recipe import placement, train_batches

LATENCY_BATCHES = (1, 32)
_EXPORTS = {"onnx": "compact.onnx", "torch": "compact.pt2"}


def finish(
    config: TrainConfig, data: ImageData, folder: RunFolder, trained: dict[str, nn.Module], listener: Listener
) -> dict[str, Any]:
    """Freeze, cut, measure, save and export what a run has trained.

    Args:
        config: of the run.
        data: of the run.
        folder: where models are written.
        trained: "dense", "gated" or both, as training left them.
        listener: hears notes.

    Returns:
        The outcome: `dense` and `frozen` with top1 (percent), macs, params and latency_ms, and, for a gated
        run, agreement, open rates, pruning rate (eq. 11) and the network's figures before the freeze.
    """
    nets: dict[str, nn.Module] = {}
    outcome: dict[str, Any] = {}
    ranks = current()
    if "gated" in trained:  # with several processes all of them vote; the rest is the first one's alone
        frozen, consensus = _frozen(trained["gated"], config, data, listener, ranks)
    if not ranks.main:
        return {}
    if "dense" in trained:
        nets["dense"] = trained["dense"]
        _reestimate_if_asked(config, data, nets["dense"])
    if "gated" in trained:
        gated = trained["gated"]
        _reestimate_if_asked(config, data, frozen)
        nets["frozen"] = compact(frozen.eval(), example_images(data, config, 1))
        outcome |= consensus_figures(gated, consensus, evaluate(gated, _test_batches(config, data))[1])
        save(gated, folder.model("gated"))
    for name, net in nets.items():
        outcome[name] = figures(net.eval(), config, data)
        save(net, folder.model("compact" if name == "frozen" else name))
    if config.latency:
        for name, times in latencies(nets, config, data).items():
            outcome[name] |= times
    if "frozen" in nets:
        outcome["exports"] = write_exports(nets["frozen"], config, data, folder, listener)
    return outcome


def figures(net: nn.Module, config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Top-1 (percent) on the test split, MACs per image (fvcore's count) and parameters of a network."""
    return {
        "top1": round(evaluate(net, _test_batches(config, data))[1], 4),
        "macs": count_macs(net, example_images(data, config, 1)),
        "params": sum(parameter.numel() for parameter in net.parameters()),
    }


def consensus_figures(gated: nn.Module, consensus: Consensus, dynamic_top1: float) -> dict[str, Any]:
    """What the gates agreed on, and the network as it was before: per-sample gates, expected MACs."""
    rates = consensus.open_rates
    everything = {name: torch.ones_like(rate) for name, rate in rates.items()}
    polarization = torch.stack([((1 - rate) * rate).mean() for rate in rates.values()]).mean()
    masks = torch.cat(list(consensus.masks.values()))
    return {
        "agreement": consensus.agreement,
        "gate_agreement": consensus.gate_agreement,
        "open_ratio": float(masks.float().mean()),
        "open_rates": {name: round(float(rate.mean()), 5) for name, rate in rates.items()},
        "pruning_rate": float(pruning_rate(gated, rates)),
        "polarization": float(polarization),
        "dynamic": {"top1": round(dynamic_top1, 4), "macs": round(float(expected_macs(gated, rates)))},
        "macs_dense": round(float(expected_macs(gated, everything))),
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
        entrants: dict[tuple[str, str], nn.Module] = {(name, "latency_ms"): net for name, net in nets.items()}
        if images.device.type == "cpu":
            engines = {(name, "engine_latency_ms"): Engine(net, images) for name, net in nets.items()}
            entrants |= {key: engine for key, engine in engines.items() if engine.plans}
        for (name, runtime), latency in measure_latency(entrants, images).items():
            times[name].setdefault(runtime, {})[str(batch)] = round(latency.median, 4)
    return times


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


def _frozen(
    gated: nn.Module, config: TrainConfig, data: ImageData, listener: Listener, ranks: Ranks = ALONE
) -> tuple[nn.Module, Consensus]:
    """Vote over the whole training split, each process over its share; what `freeze` warns of becomes a note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frozen = freeze(gated, EvalBatches(data, "train", **placement(config), rank=ranks.rank, world=ranks.world))
    for warning in caught:
        listener.note(str(warning.message))
    consensus = frozen.consensus
    assert isinstance(consensus, Consensus)  # for the type checker: nn.Module's attributes have no types
    return frozen, consensus


def _reestimate_if_asked(config: TrainConfig, data: ImageData, net: nn.Module) -> None:
    if config.bn_reestimate:
        reestimate_batchnorm(net, train_batches(config, data))


def _test_batches(config: TrainConfig, data: ImageData) -> EvalBatches:
    return EvalBatches(data, "test", **placement(config))
