"""The loss of a step without a teacher, for tests that write steps out."""

from __future__ import annotations

from torch import Tensor, nn

from gatedconv.gating import MacController, find_gates
from gatedconv.train import TrainConfig
from gatedconv.train.recipe import gate_loss, gate_weights, task_loss


def total_loss(
    model: nn.Module,
    logits: Tensor,
    labels: Tensor,
    config: TrainConfig,
    progress: float,
    controller: MacController | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy plus the losses on the gates; and the polarization before its weight, None without gates."""
    loss = task_loss(logits, labels, config.label_smoothing)
    if not find_gates(model):
        return loss, None
    of_gates, polarization = gate_loss(model, config, gate_weights(config, progress), controller)
    return loss + of_gates, polarization
