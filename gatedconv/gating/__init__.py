"""Gates.

gates.py: the modules. losses.py: polarization, activations, MACs, and the controller of a MAC target. mac_terms.py:
MACs as a polynomial in the gates. ranking.py, pruner.py: gates in order of what they matter per MAC, and closing them.
schedules.py: loss weights and the MAC target over the run. registry.py: the gates of a model. collectives.py: several
ranks.
"""

from gatedconv.gating.gates import ChannelGate, Consensus, FrozenGate, Gate, LayerGate
from gatedconv.gating.losses import MacController, activation_loss, mac_target_loss, polarization_loss
from gatedconv.gating.mac_terms import MacTerm, expected_macs, pruning_rate
from gatedconv.gating.pruner import GatePruner
from gatedconv.gating.ranking import fisher_information, gate_macs, masks_for_target, mean_logits
from gatedconv.gating.registry import (
    attribute_of,
    copied,
    eval_mode,
    find_gates,
    forget,
    open_rates,
    require_free,
    require_frozen,
    unwrap,
)
from gatedconv.ops import ESTIMATORS

__all__ = [
    "ESTIMATORS",
    "ChannelGate",
    "Consensus",
    "FrozenGate",
    "Gate",
    "LayerGate",
    "MacController",
    "MacTerm",
    "GatePruner",
    "activation_loss",
    "attribute_of",
    "copied",
    "eval_mode",
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
    "require_free",
    "require_frozen",
    "unwrap",
]
