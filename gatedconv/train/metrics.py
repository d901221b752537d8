"""Metrics of epochs: sums on the device, the evaluation, energy, and TensorBoard event files."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv._io import NUMBER, naming_file, require_schema
from gatedconv.gating import eval_mode, expected_macs, find_gates
from gatedconv.measure.energy import EnergyMeter
from gatedconv.train.distributed import SINGLE, Ranks

_THEN = "; then "  # between devices that were measured one after the other


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl.

    Attributes:
        phase: "dense", "gated" or "compact" (the compact network).
        epoch: counted from 1.
        lr: learning rate of the last step.
        train_loss: mean of the total loss over the epoch.
        train_top1: percent, of the training batches (augmented, gates as they were).
        test_loss: mean cross-entropy.
        test_top1: percent, in eval mode, gates deciding per sample.
        seconds: wall time of the epoch, evaluation included.
        core_seconds: time of all CPU cores on it, of all processes: what the epoch costs on a machine that others use.
        polar_weight: λ of the last step.
        polarization: mean over the epoch of the polarization loss (eqs. 6-8), 0 to 1/4.
        macs: expected MACs per image at the epoch's mean open rates, as a share of the dense network's; None without
            gates.
        open_rate: mean open rate over all gates, 0 to 1; None without gates.
        gates_dead: gates that the whole last training batch closed, beyond the estimator's window: no gradient
            reaches them.
        gates_saturated: gates beyond the window on either side, the dead ones included.
        num_gates: single gates in the network.
        steps_skipped: steps whose loss or gradient was not finite; they left the weights unchanged.
        train_macs: MACs that the training steps executed, forward and (twice that) backward, repeated steps and
            recomputed blocks included; steps lost with a killed process are not.
        macs_saved: share of the MACs of the present network that steps left out because gates agreed, 0 to 1.
        energy_j: joules of all devices in use; None where a device has no counter.
        energy_reason: why `energy_j` is None; "" where it is not.
        energy_source: the devices that were measured, of all processes.
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
    macs: float | None = None
    open_rate: float | None = None
    gates_dead: int = 0
    gates_saturated: int = 0
    num_gates: int = 0
    steps_skipped: int = 0
    core_seconds: float = 0.0
    train_macs: float = 0.0
    macs_saved: float = 0.0
    energy_j: float | None = None
    energy_reason: str = ""
    energy_source: str = ""
    gate_open_rates: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any, where: str, error: type[ValueError] = ValueError) -> EpochMetrics:
        """Metrics from what `as_dict` returned; `where` and `error` are those of `require_schema`.

        Raises:
            ValueError: `error`, naming the field that is missing, of another type or unknown.
        """
        require_schema(record, _schema(), where, error)
        unknown = record.keys() - {spec.name for spec in fields(cls)}
        if unknown:
            raise error(f"{where}: unknown key {sorted(unknown)[0]!r}")
        return cls(**record)


def _schema() -> dict[str, Any]:
    kinds = {"str": str, "int": int, "float": NUMBER, "float | None": (*NUMBER, type(None)), "dict[str, float]": dict}
    return {
        spec.name + ("?" if (spec.default, spec.default_factory) != (MISSING, MISSING) else ""): kinds[str(spec.type)]
        for spec in fields(EpochMetrics)
    }


class EpochMeter:
    """Sums of one epoch, on the device: adding to them never waits for it.

    Args:
        model: the network; its gates name the open rates.
        device: of the network.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.gates = find_gates(model)
        self._sizes = [gate.num_gates for gate in self.gates.values()]
        # Steps, images, loss, correct answers, polarization, then the open rate of every gate.
        self._sums = torch.zeros(5 + sum(self._sizes), dtype=torch.float64, device=device)
        self._one = torch.ones((), dtype=torch.float64, device=device)

    def new_epoch(self) -> None:
        """Reset, in the same memory: a CUDA graph may add to it."""
        self._sums.zero_()

    @torch.no_grad()
    def add(
        self,
        logits: Tensor,
        labels: Tensor,
        loss: Tensor,
        polarization: Tensor | None = None,
        open_rates: Tensor | None = None,
        bad: Tensor | None = None,
        weight: float = 1.0,
    ) -> None:
        """Add one step.

        Args:
            logits: (B, classes).
            labels: int64 (B,).
            loss: the total loss, a scalar.
            polarization: its polarization part, a scalar; None counts as 0.
            open_rates: (G,) of all gates over the step's images, in the order of `gates`; None without gates.
            bad: bool (); True leaves the step out.
            weight: of this rank's images, 1 on average over the ranks.
        """
        one, right = self._one, (logits.argmax(1) == labels).sum()
        shown = torch.cat(
            [
                torch.stack([one, len(labels) * one, weight * loss.detach().double(), right.double()]),
                (self._sums.new_zeros(()) if polarization is None else polarization.detach().double())[None],
                *([] if open_rates is None else [weight * open_rates.double()]),
            ]
        )
        self._sums += shown if bad is None else shown.masked_fill(bad, 0.0)

    def total(self, ranks: Ranks) -> dict[str, Tensor]:
        """The sums so far, over all ranks; a collective."""
        return {"sums": ranks.sum(self._sums)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from sums; KeyError or RuntimeError where they are those of another network."""
        self._sums.copy_(state["sums"])

    @property
    def mean_loss(self) -> float:
        """Mean loss so far, NaN before any good step; reading it waits for the device."""
        steps, _, loss = self._sums[:3].tolist()
        return loss / steps if steps else math.nan

    @property
    def top1(self) -> float:
        """Percent correct so far; reading it waits for the device."""
        _, images, _, right = self._sums[:4].tolist()
        return 100 * right / max(1.0, images)

    def gate_metrics(self, ranks: Ranks) -> dict[str, Any]:
        """The fields of `EpochMetrics` about gates; empty for a network without gates. A collective."""
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
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks = SINGLE) -> tuple[float, float]:
    """Evaluate a classifier in eval mode; its mode is restored.

    Args:
        model: images float (B, C, H, W) -> logits (B, classes).
        batches: (images, labels int64 (B,)).
        ranks: processes that evaluate a share of the images each; a collective.

    Returns:
        Mean cross-entropy and top-1 in percent.

    Raises:
        ValueError: no images to evaluate on.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct answers, images
    one = torch.ones((), dtype=torch.float64, device=device)  # a number from the host would make it wait
    with eval_mode(model):
        for images, labels in batches:
            logits = model(images).float()
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            right = (logits.argmax(1) == labels).sum()
            sums += torch.stack([loss, right.double(), len(labels) * one])
    loss_sum, correct, count = ranks.sum(sums).tolist()
    if count == 0:
        raise ValueError("evaluate: expected at least one image, got none")
    return loss_sum / count, 100 * correct / count


@dataclass(frozen=True)
class Energy:
    """Joules; where they are None, the reason; and the names of the measured devices."""

    joules: float | None = 0.0
    reason: str = ""
    source: str = ""


def measured_energy(meter: EnergyMeter) -> Energy:
    """Energy of this process since its meter was started; 0 for a device that another rank measures."""
    if meter.elsewhere:
        return Energy()
    joules = meter.joules()
    return Energy(joules, meter.reason, meter.source)


def total_energy(parts: Sequence[Energy]) -> Energy:
    """The energy of all processes: None where one of them has no counter."""
    names = Counter(name for part in parts for name in part.source.split(", ") if name)
    source = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    return Energy(_sum(part.joules for part in parts), _first(part.reason for part in parts), source)


def added_energy(earlier: Energy, now: Energy) -> Energy:
    """The energy before and after a restart, or of one epoch after the other; each device is named once."""
    sources = [*earlier.source.split(_THEN), *now.source.split(_THEN)]
    source = _THEN.join(dict.fromkeys(source for source in sources if source))
    return Energy(_sum([earlier.joules, now.joules]), _first([earlier.reason, now.reason]), source)


def run_energy(history: Sequence[EpochMetrics]) -> Energy:
    """The energy of all epochs: None, with the first reason, where one of them was not measured."""
    if not history:
        return Energy(None, "no epoch was measured")
    epochs = (Energy(line.energy_j, line.energy_reason, line.energy_source) for line in history)
    total = reduce(added_energy, epochs)
    if total.joules is not None:
        return replace(total, joules=round(total.joules, 3), reason="")
    silent = _first(f"{line.phase}, epoch {line.epoch}: not measured" for line in history if line.energy_j is None)
    return replace(total, reason=total.reason or silent)


def _sum(joules: Iterable[float | None]) -> float | None:
    total = 0.0
    for each in joules:
        if each is None:
            return None
        total += each
    return total


def _first(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")


_SCALARS = (
    "lr",
    "train_loss",
    "train_top1",
    "test_loss",
    "test_top1",
    "polar_weight",
    "polarization",
    "macs",
    "open_rate",
    "gates_dead",
    "gates_saturated",
)


def require_tensorboard() -> None:
    """Raise ImportError, with the command that installs it, if TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("tensorboard: not installed: pip install 'gatedconv[tensorboard]'")


class TensorBoard:
    """Writes one point per epoch and metric, under the name of the phase.

    Attributes:
        empty: the folder had no event files before.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the disk is full or not writable.
    """

    def __init__(self, folder: Path) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self.empty = not any(folder.glob("events.*"))
        with naming_file(folder):
            self._writer = SummaryWriter(str(folder))

    def close(self) -> None:
        """Write what is left."""
        with naming_file(self._folder):
            self._writer.close()

    def write(self, metrics: EpochMetrics) -> None:
        """Add the metrics of one epoch."""
        with naming_file(self._folder):
            for name in _SCALARS:
                if (value := getattr(metrics, name)) is not None:
                    self._writer.add_scalar(f"{metrics.phase}/{name}", value, metrics.epoch)
