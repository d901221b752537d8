"""The figures of a finished run (read `measure_networks` first), and the exported files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.data import ImageData
from gatedconv.deploy import export
from gatedconv.engine import Engine
from gatedconv.gating import Consensus, expected_macs, pruning_rate
from gatedconv.measure.energy import EnergyMeter, energy_per_call
from gatedconv.measure.latency import block_figures, measure_latency
from gatedconv.measure.macs import conv_and_linear_macs, count_macs_by_operator
from gatedconv.train.build import build_model
from gatedconv.train.checkpoint import read_consensus
from gatedconv.train.config import TrainConfig
from gatedconv.train.metrics import evaluate
from gatedconv.train.recipe import eval_batches
from gatedconv.train.run_dir import RunFolder

LATENCY_BATCHES = (1, 32)
NO_ENERGY: dict[str, Any] = {"energy_j": None, "energy_j_image": None}
Summary = dict[str, Any]
_EXPORTS = {"onnx": "compact.onnx", "torch": "compact.pt2"}


def example_images(data: ImageData, config: TrainConfig, batch: int) -> Tensor:
    """The first test images, normalized, on the run's device, (batch, C, H, W); repeated if there are too few."""
    return eval_batches(config, data).first(batch)


def measure_networks(
    networks: Mapping[str, nn.Module], config: TrainConfig, data: ImageData, folder: RunFolder
) -> Summary:
    """Figures of the dense and the compact network, and of the consensus of a gated run.

    Returns:
        `dense` and `frozen` with top1 (percent), macs, params, latency_ms and energy, and, for a gated run, agreement,
        open rates, pruning rate (eq. 11), the gated network's figures and those of each block.
    """
    nets = {name: networks[key] for name, key in (("dense", "dense"), ("frozen", "compact")) if key in networks}
    found: Summary = {}
    if "gated" in networks:
        consensus, found = read_consensus(folder.consensus)
        macs = count_macs_by_operator(build_model(config, data, gated=False), torch.zeros(1, *data.image_shape))
        found["macs_conv_dense"] = conv_and_linear_macs(macs)
    for name, net in nets.items():
        found[name] = evaluate_network(net.eval(), config, data)
    measures = config.latency and not config.shared_device
    if measures:
        for name, times in measure_latencies(nets, config, data).items():
            found[name] |= times
    for name, net in nets.items():
        found[name] |= measure_energies(net, config, data) if measures else NO_ENERGY
    if "gated" in networks:
        one = example_images(data, config, 1)
        found["blocks"] = block_figures(nets["frozen"], consensus.masks, one, rounds=9 if measures else 0)
    return found


def evaluate_network(net: nn.Module, config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Top-1 (percent) on the test split, MACs per image (fvcore's count, and without norms) and parameters."""
    operators = count_macs_by_operator(net, example_images(data, config, 1))
    return {
        "top1": round(evaluate(net, eval_batches(config, data))[1], 4),
        "macs": sum(operators.values()),
        "macs_conv": conv_and_linear_macs(operators),
        "params": sum(parameter.numel() for parameter in net.parameters()),
    }


def summarize_consensus(gated: nn.Module, consensus: Consensus, dynamic_top1: float) -> dict[str, Any]:
    """Figures of the consensus, and of the gated network before it: top-1 (percent) and expected MACs per image."""
    rates = consensus.open_rates
    everything = {name: torch.ones_like(rate) for name, rate in rates.items()}
    polarization = torch.stack([((1 - rate) * rate).mean() for rate in rates.values()]).mean()
    masks = torch.cat(list(consensus.masks.values()))
    return {
        "agreement": consensus.agreement,
        "gate_agreement": consensus.gate_agreement,
        "open_ratio": float(masks.float().mean()),
        "open_rates": {name: round(float(rate.mean()), 5) for name, rate in rates.items()},
        "pruning_rate": float(pruning_rate(gated, {name: consensus.masks[name].to(rates[name]) for name in rates})),
        "polarization": float(polarization),
        "dynamic": {"top1": round(dynamic_top1, 4), "macs": round(float(expected_macs(gated, rates)))},
        "macs_dense": round(float(expected_macs(gated, everything))),
    }


def measure_latencies(
    nets: dict[str, nn.Module], config: TrainConfig, data: ImageData
) -> dict[str, dict[str, dict[str, float]]]:
    """The fastest call in ms at batch 1 and 32, of all networks and their engines, timed in an interleaved way.

    Returns:
        {name: {"latency_ms": {"1": ms, "32": ms}}} of PyTorch's eager mode, and "engine_latency_ms" where our engine
        runs the network natively.
    """
    times: dict[str, dict[str, dict[str, float]]] = {name: {} for name in nets}
    for batch in LATENCY_BATCHES:
        images = example_images(data, config, batch)
        candidates: dict[tuple[str, str], Callable[[Tensor], object]] = {
            (name, "latency_ms"): net for name, net in nets.items()
        }
        if images.device.type == "cpu":
            engines = {(name, "engine_latency_ms"): Engine(net, images) for name, net in nets.items()}
            candidates |= {key: engine for key, engine in engines.items() if engine.plans}
        for (name, runtime), latency in measure_latency(candidates, images).items():
            times[name].setdefault(runtime, {})[str(batch)] = round(latency.least, 4)
    return times


def measure_energies(net: nn.Module, config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Joules in eager mode: of one call at batch 1 and 32, and of an image of the larger batch.

    Returns:
        {"energy_j": {"1": J, "32": J}, "energy_j_image": J}; None where the machine has no counter.
    """
    found: dict[str, float | None] = {}
    for batch in LATENCY_BATCHES:
        images = example_images(data, config, batch)
        meter = EnergyMeter(images.device)
        if meter.reason:
            return NO_ENERGY
        wait = torch.cuda.synchronize if images.is_cuda else None
        found[str(batch)] = energy_per_call(partial(net, images), meter, synchronize=wait)
    largest = max(LATENCY_BATCHES)
    joules = found[str(largest)]
    return {"energy_j": found, "energy_j_image": None if joules is None else joules / largest}


def write_exports(net: nn.Module, example: Tensor, folder: Path, note: Callable[[str], object]) -> list[str]:
    """Export the compact network to every format whose packages are installed.

    Args:
        net: the network.
        example: images (1, C, H, W).
        folder: of the files.
        note: called with the reason where a file is not written.

    Returns:
        The names of the files.
    """
    written = []
    for kind, name in _EXPORTS.items():
        try:
            export(net, folder / name, example, format=kind)
        except ImportError as error:
            note(f"{name} not written: {error}")
        else:
            written.append(name)
    return written
