"""What is measured while training: sums over an epoch, kept on the device until the epoch ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatedconv.gates import expected_macs, find_gates
from gatedconv.train.record import NUMBER, require_form


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl.

    Attributes:
        phase: "dense" or "gated".
        epoch: counted from 1.
        lr: learning rate of the last step.
        train_loss: mean of the whole loss over the epoch.
        train_top1: percent, of the batches as trained on (augmented, gates as they were).
        test_loss: mean cross-entropy.
        test_top1: percent, in eval mode, gates deciding per sample.
        seconds: wall time of the epoch, evaluation included.
        polar_weight: λ of the last step.
        polarization: mean over the epoch of the polarization loss (eqs. 6-8), 0 to 1/4.
        macs: expected MACs per image at the epoch's mean open rates, as a share of the dense network's.
        open_rate: mean open rate over all gates, 0 to 1.
        gates_dead: gates shut beyond the estimator's window for the whole last training batch: nothing moves
            them.
        gates_saturated: gates beyond the window on either side; contains the dead ones.
        num_gates: single gates in the network.
        gate_open_rates: mean open rate of each gate module over the epoch, by name.
    """

    phase: str
    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    test_loss: float
    test_top1: float
    seconds: float
    polar_weight: float = 0.0
    polarization: float = 0.0
    macs: float = 1.0
    open_rate: float = 1.0
    gates_dead: int = 0
    gates_saturated: int = 0
    num_gates: int = 0
    gate_open_rates: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, as they are written."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any, where: str, error: type[ValueError] = ValueError) -> EpochMetrics:
        """The metrics that `as_dict` wrote; `where` and `error` are for `require_form`, which checks them.

        Raises:
            ValueError: `error`, naming the field that is missing, of another type or unknown.
        """
        require_form(record, _form(), where, error)
        unknown = record.keys() - {spec.name for spec in fields(cls)}
        if unknown:
            raise error(f"{where}: unknown key {sorted(unknown)[0]!r}")
        return cls(**record)


def _form() -> dict[str, Any]:
    kinds = {"str": str, "int": int, "float": NUMBER, "dict[str, float]": dict}
    return {
        spec.name + ("?" if (spec.default, spec.default_factory) != (MISSING, MISSING) else ""): kinds[str(spec.type)]
        for spec in fields(EpochMetrics)
    }


class EpochMeter:
    """Adds up what the steps of one epoch show, without making the device wait.

    Args:
        model: the network; its gates are read after each step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gates = find_gates(model)
        self.images = 0
        self.steps = 0
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | float = 0.0
        self._polarization: Tensor | float = 0.0
        self._open_rates: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor, polarization: Tensor | None) -> None:
        """Take in one step: logits (B, classes), labels (B,), the whole loss and its polarization part."""
        self.steps += 1
        self.images += len(labels)
        self._loss = self._loss + loss.detach()
        self._correct = self._correct + (logits.argmax(1) == labels).sum()
        if polarization is not None:
            self._polarization = self._polarization + polarization.detach()
            rates = [gate.open_rate for gate in self.gates.values() if gate.open_rate is not None]
            self._open_rates = self._open_rates + torch.cat(rates).detach()

    @property
    def mean_loss(self) -> float:
        """Mean loss so far; reading it waits for the device."""
        return float(self._loss) / max(1, self.steps)

    @property
    def top1(self) -> float:
        """Percent right so far; reading it waits for the device."""
        return 100 * float(self._correct) / max(1, self.images)

    def gate_metrics(self) -> dict[str, Any]:
        """The fields of `EpochMetrics` that speak of gates; empty for a network without."""
        if not isinstance(self._open_rates, Tensor):
            return {}
        means = self._open_rates / self.steps
        rates = dict(zip(self.gates, means.split([gate.num_gates for gate in self.gates.values()]), strict=True))
        learning = [gate for gate in self.gates.values() if gate.logits is not None]
        everything = {name: torch.ones_like(rate) for name, rate in rates.items()}
        return {
            "polarization": float(self._polarization) / self.steps,
            "macs": float(expected_macs(self.model, rates) / expected_macs(self.model, everything)),
            "open_rate": float(means.mean()),
            "gates_dead": sum(int(gate.dead.sum()) for gate in learning),
            "gates_saturated": sum(int(gate.saturated.sum()) for gate in learning),
            "num_gates": means.numel(),
            "gate_open_rates": {name: round(float(rate.mean()), 5) for name, rate in rates.items()},
        }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Evaluate a classifier in eval mode; its mode is put back after.

    Args:
        model: images float (B, C, H, W) -> logits (B, classes).
        batches: (images, labels int64 (B,)).

    Returns:
        Mean cross-entropy and top-1 in percent.

    Raises:
        ValueError: no images to evaluate on.
    """
    was_training = model.training
    model.eval()
    loss: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    count = 0
    for images, labels in batches:
        logits = model(images).float()
        loss = loss + functional.cross_entropy(logits, labels, reduction="sum")
        correct = correct + (logits.argmax(1) == labels).sum()
        count += len(labels)
    model.train(was_training)
    if count == 0:
        raise ValueError("evaluate: expected at least one image, got none")
    return float(loss) / count, 100 * float(correct) / count
