"""What is measured while training: sums over an epoch, kept on the device until the epoch ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatedconv.gating import expected_macs, find_gates
from gatedconv.train.distributed import ALONE, Ranks
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
        steps_skipped: steps whose loss or gradient was not finite, which left the weights alone.
        train_macs: multiply-accumulates that the epoch's training steps executed, forward and (twice that) backward;
            steps made again and blocks recomputed included, what was lost with a killed process not.
        macs_saved: share of those of the whole network that were left out because gates agreed, 0 to 1.
        energy_j: joules that the epoch took on all devices that it used; None where one of them does not tell.
        energy_reason: why there are none; "" where there are.
        energy_source: the devices that were counted, of all processes, for people.
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
    steps_skipped: int = 0
    train_macs: float = 0.0
    macs_saved: float = 0.0
    energy_j: float | None = None
    energy_reason: str = ""
    energy_source: str = ""
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
    kinds = {"str": str, "int": int, "float": NUMBER, "float | None": (*NUMBER, type(None)), "dict[str, float]": dict}
    return {
        spec.name + ("?" if (spec.default, spec.default_factory) != (MISSING, MISSING) else ""): kinds[str(spec.type)]
        for spec in fields(EpochMetrics)
    }


class EpochMeter:
    """Adds up what the steps of one epoch show, without making the device wait.

    Args:
        model: the network; its gates are read after each step.
        device: of the network.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.gates = find_gates(model)
        self._sizes = [gate.num_gates for gate in self.gates.values()]
        # Steps, images, loss, right answers, polarization, then the open rate of every gate.
        self._sums = torch.zeros(5 + sum(self._sizes), dtype=torch.float64, device=device)
        self._one = torch.ones((), dtype=torch.float64, device=device)

    def new_epoch(self) -> None:
        """Begin again, in the same memory: a CUDA graph may add to it."""
        self._sums.zero_()

    @torch.no_grad()
    def add(
        self,
        logits: Tensor,
        labels: Tensor,
        loss: Tensor,
        polarization: Tensor | None,
        bad: Tensor | None = None,
        weight: float = 1.0,
    ) -> None:
        """Take in one step: logits (B, classes), labels (B,), the whole loss and its polarization part.

        ``bad``, bool (), leaves the step out; ``weight`` is that of this rank's images among its fellows', 1 on
        average.
        """
        one, right = self._one, (logits.argmax(1) == labels).sum()
        rates = [gate.open_rate.detach() for gate in self.gates.values() if gate.open_rate is not None]
        shown = torch.cat(
            [
                torch.stack([one, len(labels) * one, weight * loss.detach().double(), right.double()]),
                self._or_zero(polarization)[None],
                *(weight * rate.double() for rate in rates),
            ]
        )
        self._sums += shown if bad is None else shown.masked_fill(bad, 0.0)

    def _or_zero(self, value: Tensor | None) -> Tensor:
        return self._sums.new_zeros(()) if value is None else value.detach().double()

    def joined(self, ranks: Ranks) -> dict[str, Tensor]:
        """The sums so far, over all ranks; a collective."""
        return {"sums": ranks.sum(self._sums)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from sums; KeyError or RuntimeError where they are another network's."""
        self._sums.copy_(state["sums"])

    @property
    def mean_loss(self) -> float:
        """Mean loss so far, NaN before any good step; reading it waits for the device."""
        steps, _, loss = self._sums[:3].tolist()
        return loss / steps if steps else math.nan

    @property
    def top1(self) -> float:
        """Percent right so far; reading it waits for the device."""
        _, images, _, right = self._sums[:4].tolist()
        return 100 * right / max(1.0, images)

    def gate_metrics(self, ranks: Ranks) -> dict[str, Any]:
        """The fields of `EpochMetrics` that speak of gates; empty for a network without. A collective."""
        if not self.gates:
            return {}
        steps = self._sums[0]
        means = (self._sums[5:] / steps).float()
        rates = dict(zip(self.gates, means.split(self._sizes), strict=True))
        learning = [gate for gate in self.gates.values() if gate.logits is not None]
        everything = {name: torch.ones_like(rate) for name, rate in rates.items()}
        stuck = {"gates_dead": 0, "gates_saturated": 0}
        if learning:
            flags = torch.stack([torch.cat([g.dead for g in learning]), torch.cat([g.saturated for g in learning])])
            counts = (ranks.sum(flags.int()) == ranks.world).sum(dim=1).tolist()
            stuck = dict(zip(stuck, counts, strict=True))
        return {
            "polarization": float(self._sums[4] / steps),
            "macs": float(expected_macs(self.model, rates) / expected_macs(self.model, everything)),
            "open_rate": float(means.mean()),
            **stuck,
            "num_gates": means.numel(),
            "gate_open_rates": {name: round(float(rate.mean()), 5) for name, rate in rates.items()},
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    ranks: Ranks = ALONE,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Evaluate a classifier in eval mode; its mode is put back after.

    Args:
        model: images float (B, C, H, W) -> logits (B, classes).
        batches: (images, labels int64 (B,)).
        ranks: processes that evaluate a share of the images each; a collective.
        forward: calls the model in its stead.

    Returns:
        Mean cross-entropy and top-1 in percent.

    Raises:
        ValueError: no images to evaluate on.
    """
    was_training = model.training
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, images
    one = torch.ones((), dtype=torch.float64, device=device)  # a number from the host would make it wait
    for images, labels in batches:
        logits = (forward or model)(images).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum").double()
        right = (logits.argmax(1) == labels).sum()
        sums += torch.stack([loss, right.double(), len(labels) * one])
    model.train(was_training)
    loss_sum, correct, count = ranks.sum(sums).tolist()
    if count == 0:
        raise ValueError("evaluate: expected at least one image, got none")
    return loss_sum / count, 100 * correct / count
