"""The consensus of a run: which gates stay open, decided once and kept in a file."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatedconv.data import EvalBatches, ImageData
from gatedconv.deploy import Consensus, freeze
from gatedconv.gating import (
    expected_macs,
    fisher_information,
    gate_macs,
    masks_for_target,
    mean_logits,
    pruning_rate,
)
from gatedconv.train.config import TrainConfig
from gatedconv.train.distributed import ALONE, Ranks
from gatedconv.train.listener import Listener
from gatedconv.train.masks import Figures
from gatedconv.train.recipe import placement, train_batches


def settle(
    gated: nn.Module, config: TrainConfig, data: ImageData, listener: Listener, ranks: Ranks = ALONE
) -> tuple[nn.Module, Consensus]:
    """Decide by a pass over the training split, each process over its share; a collective.

    Returns:
        The frozen network, and the consensus: with `consensus_by` "vote" the majority of the samples, else the
        gates that rank highest, as many as `mac_target` allows. Agreement is the samples' own either way.
        What `freeze` warns of becomes a note.
    """
    masks = None
    if config.consensus_by != "vote":
        masks = ranks.agree(_ranked(gated, config, data, ranks))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = EvalBatches(data, "train", **placement(config), rank=ranks.rank, world=ranks.world)
        frozen = freeze(gated, own, masks=masks)
    for warning in caught:
        listener.note(str(warning.message))
    consensus = frozen.consensus
    assert isinstance(consensus, Consensus)  # for the type checker: nn.Module's attributes have no types
    return frozen, consensus


def freeze_again(gated: nn.Module, consensus: Consensus) -> nn.Module:
    """The frozen network of `settle`, from the consensus that was kept: a resumed run asks no image again."""
    frozen = freeze(gated, masks=consensus.masks)
    vars(frozen)["consensus"] = consensus
    return frozen


def _ranked(gated: nn.Module, config: TrainConfig, data: ImageData, ranks: Ranks) -> dict[str, Tensor]:
    """Masks of the gates that rank highest by what the whole training split says, each process asking its share."""
    if config.consensus_by == "logit":
        share = EvalBatches(data, "train", **placement(config), rank=ranks.rank, world=ranks.world)
        scores = mean_logits(gated, share)
    else:
        information = fisher_information(gated, train_batches(config, data, ranks=ranks), functional.cross_entropy)
        costs = gate_macs(gated)
        scores = {name: value / costs[name] for name, value in information.items()}
    return masks_for_target(gated, scores, config.mac_target)


def consensus_figures(gated: nn.Module, consensus: Consensus, dynamic_top1: float) -> Figures:
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
        "pruning_rate": float(pruning_rate(gated, {name: consensus.masks[name].to(rates[name]) for name in rates})),
        "polarization": float(polarization),
        "dynamic": {"top1": round(dynamic_top1, 4), "macs": round(float(expected_macs(gated, rates)))},
        "macs_dense": round(float(expected_macs(gated, everything))),
    }
