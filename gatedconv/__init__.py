"""Train a network with gated layers and channels once, freeze the sub-network its gates agree on, and compact it.

The public names are those of ``gatedconv.__all__``, the networks of ``gatedconv.models``, the operators of
``gatedconv.ops``, ``gatedconv.schedules``, and ``gatedconv.HubModel``, which requires the extra ``hub``.
"""

from typing import Any

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"gatedconv requires torch 2.11 or newer, found {torch.__version__}: pip install --upgrade torch")

from gatedconv import models, ops
from gatedconv.convert import attach_macs, gate_model
from gatedconv.deploy import compact, export, freeze, load, re_estimate_batchnorm, save
from gatedconv.engine import Engine
from gatedconv.gating import (
    ChannelGate,
    Consensus,
    GatePruner,
    LayerGate,
    MacController,
    activation_loss,
    expected_macs,
    fisher_information,
    mac_target_loss,
    masks_for_target,
    polarization_loss,
    pruning_rate,
    schedules,
)
from gatedconv.gating import find_gates as gates
from gatedconv.measure.macs import count_macs
from gatedconv.nn import Conv2d

__version__ = "0.1.0"

__all__ = [
    "ChannelGate",
    "Consensus",
    "Conv2d",
    "Engine",
    "GatePruner",
    "LayerGate",
    "MacController",
    "activation_loss",
    "attach_macs",
    "compact",
    "count_macs",
    "expected_macs",
    "export",
    "fisher_information",
    "freeze",
    "gate_model",
    "gates",
    "load",
    "mac_target_loss",
    "masks_for_target",
    "models",
    "ops",
    "polarization_loss",
    "pruning_rate",
    "re_estimate_batchnorm",
    "save",
    "schedules",
]


def __getattr__(name: str) -> Any:
    if name == "HubModel":  # requires an extra, and is slow to import
        from gatedconv.deploy.hub import HubModel

        return HubModel
    raise AttributeError(f"module 'gatedconv' has no attribute {name!r}")
