"""Gates: estimators, gate modules, the losses that polarise them, schedules, and what they cost."""

from gatedconv.gates.channel_gate import ChannelGate
from gatedconv.gates.controller import MacController
from gatedconv.gates.costs import MacTerm, expected_macs, pruning_rate
from gatedconv.gates.estimators import ESTIMATORS
from gatedconv.gates.gate import FrozenGate, Gate
from gatedconv.gates.layer_gate import LayerGate
from gatedconv.gates.losses import activation_loss, mac_target_loss, polarization_loss
from gatedconv.gates.ranking import fisher_information, gate_macs, masks_for_target, mean_logits
from gatedconv.gates.registry import find_gates, forget, open_rates, unwrap
from gatedconv.gates.shutter import Shutter

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
