"""Gates: estimators, gate modules, the losses that polarise them, schedules, and what they cost."""

from gatedconv.gating.channel_gate import ChannelGate
from gatedconv.gating.controller import MacController
from gatedconv.gating.costs import MacTerm, expected_macs, pruning_rate
from gatedconv.gating.estimators import ESTIMATORS
from gatedconv.gating.gate import FrozenGate, Gate
from gatedconv.gating.layer_gate import LayerGate
from gatedconv.gating.losses import activation_loss, mac_target_loss, polarization_loss
from gatedconv.gating.ranking import fisher_information, gate_macs, masks_for_target, mean_logits
from gatedconv.gating.registry import find_gates, forget, open_rates, unwrap
from gatedconv.gating.shutter import Shutter

__all__ = [
    "ESTIMATORS",
    "ChannelGate",
    "FrozenGate",
    "Gate",
    "LayerGate",
    "MacController",
    "MacTerm",
    "Shutter",
    "activation_loss",
    "expected_macs",
    "find_gates",
    "forget",
    "fisher_information",
    "gate_macs",
    "mac_target_loss",
    "masks_for_target",
    "mean_logits",
    "open_rates",
    "polarization_loss",
    "pruning_rate",
    "unwrap",
]
