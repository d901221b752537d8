"""The gates: modules that decide, per sample, what stays open, and the estimators of their gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv import ops
from gatedconv._checks import require_choice
from gatedconv.gating.collectives import SynchronizedNorm
from gatedconv.ops.estimate import DEFAULT_TEMPERATURE, require_estimator
from gatedconv.ops.gate import compute_gate

POOLS = ("avg", "flatten")
RUNNING_MOMENTUM = 0.1  # as BatchNorm's running statistics: about the last ten batches


class Gate(nn.Module):
    """A set of ``num_gates`` binary decisions per sample.

    Attributes:
        num_gates: number of decisions, one logit each.
        calls: how often it decides in one forward of its model; 1 but for a module that is called several times.
        logits: (N, num_gates), of the last call; of several, the rows of the last ``calls`` calls. None before any.
        open_rate: (num_gates,), mean of the gate over the last batch, differentiable in training; of several calls,
            over all their rows. None before any call.
        needs_gradient: whether something other than the gate's own parameters uses the gradient that arrives here, as
            `GatePruner` does. In training a block is then skipped only where the gate is closed for good.
        global_open_rate: ``open_rate``, and its mean over all ranks, once a loss has computed that mean; else None.
        running_open_rate: buffer (num_gates,), exponential mean of ``open_rate`` over training batches.
        mask: None while the gate learns; bool (num_gates,) once it is frozen.
    """

    running_open_rate: Tensor
    mask: Tensor | None

    def __init__(self, num_gates: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if isinstance(num_gates, bool) or not isinstance(num_gates, int):
            raise TypeError(f"{type(self).__name__}: num_gates must be an int, got {num_gates!r}")
        if num_gates < 1:
            raise ValueError(f"{type(self).__name__}: num_gates must be at least 1, got {num_gates}")
        self.num_gates = num_gates
        self.calls = 1
        self.needs_gradient = False
        self.logits: Tensor | None = None
        self.open_rate: Tensor | None = None
        self.global_open_rate: tuple[Tensor, Tensor] | None = None
        self.register_buffer("running_open_rate", torch.ones(num_gates, device=device, dtype=dtype))

    @property
    def saturated(self) -> Tensor:
        """Bool (num_gates,): learning gates that no sample of the last batch could move; never a constant."""
        return torch.zeros_like(self.running_open_rate, dtype=torch.bool)

    @property
    def dead(self) -> Tensor:
        """Bool (num_gates,): saturated gates that were closed for the whole last batch."""
        return torch.zeros_like(self.running_open_rate, dtype=torch.bool)

    def forget(self) -> None:
        """Drop what belongs to the last calls."""
        self.logits = self.open_rate = self.global_open_rate = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop what belongs to the last calls: tensors of a graph can be neither copied nor pickled."""
        return {**self.__dict__, "logits": None, "open_rate": None, "global_open_rate": None}


class Estimator(nn.Module):
    r"""The state of an estimator between calls, its noise, and the distance of logits from its threshold.

    Logits are (N, num_gates). In training it may draw noise; in eval it is deterministic.

    "ste": eqs. 3-4 of the paper: forward z > 0; backward the identity where \|z\| <= 1. "gumbel": hard
    binary Gumbel-softmax (Jang et al. 2017). "bernoulli": a sample of Bernoulli(sigmoid(z)) with the gradient
    of the probability (Bengio et al. 2013). "batch_mean": the paper's "Bernoulli" ablation, open above the
    batch mean of the logits (section 4.4); in eval above the running mean of the training batches, so that a
    prediction depends on its own image alone.

    Attributes:
        running_mean: buffer (num_gates,) of "batch_mean"; None for the others.
    """

    running_mean: Tensor | None

    def __init__(self, name: str, num_gates: int, temperature: float, device: Any = None) -> None:
        super().__init__()
        self.name = name
        self.temperature = temperature
        self.register_buffer("running_mean", torch.zeros(num_gates, device=device) if name == "batch_mean" else None)

    def draw_noise(self, batch: int, num_gates: int, like: Tensor) -> Tensor | None:
        """Uniform noise (batch, num_gates) of this call, in the dtype of ``like``; None if none is needed."""
        if not self.training or self.name not in ("gumbel", "bernoulli"):
            return None
        return torch.rand(batch, num_gates, dtype=like.dtype, device=like.device)

    def margin(self, logits: Tensor) -> Tensor:
        """Signed distance (N, num_gates) from the threshold, of which eq. 4 lets gradients through up to 1.

        0 for estimators without such a window: their gradient never vanishes.
        """
        if self.running_mean is not None:
            threshold = logits.mean(dim=0) if self.training else self.running_mean
            return logits - threshold
        return logits if self.name == "ste" else torch.zeros_like(logits)


class LearnedGate(Gate):
    """features -> dense ``hidden`` -> BatchNorm1d -> ReLU -> dense ``num_gates`` -> estimator.

    With ``hidden=None`` there is the dense layer ``fc2`` alone (the paper's 1FC). `gatedconv.ops.gate` computes it: in
    the parameters' dtype, whether under autocast or not, and by kernels on a GPU.
    """

    pool: str

    def __init__(
        self,
        in_features: int,
        num_gates: int,
        *,
        hidden: int | None,
        estimator: str,
        temperature: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_gates, device=device, dtype=dtype)
        name = type(self).__name__
        if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1):
            raise ValueError(f"{name}: hidden must be a positive int or None, got {hidden!r}")
        self.mask = None
        # Of the last `calls` calls, where there are several in a forward; and whether a backward has passed them.
        self._noted: list[ops.GateOutput] = []
        self._passed: list[bool] = []
        require_estimator(name, estimator, temperature)
        self.estimator = Estimator(estimator, num_gates, float(temperature), device)
        self.fc1 = nn.Linear(in_features, hidden, device=device, dtype=dtype) if hidden else None
        self.norm = nn.BatchNorm1d(hidden, device=device, dtype=dtype) if hidden else None
        self.fc2 = nn.Linear(hidden or in_features, num_gates, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start open: logits about 0.5, inside the estimator's window, so that every gate can still move."""
        for layer in (self.fc1, self.norm, self.fc2):
            if layer is not None:
                layer.reset_parameters()
        nn.init.constant_(self.fc2.bias, 0.5)
        nn.init.normal_(self.fc2.weight, std=0.1 / self.fc2.in_features**0.5)
        nn.init.ones_(self.running_open_rate)

    @property
    def saturated(self) -> Tensor:
        """Bool (num_gates,): gates that no sample of the last batch could move.

        Where abs(logit) > 1 the straight-through estimator passes no gradient (eq. 4), "batch_mean" where
        the logit is that far from its threshold; the other estimators always pass one.

        Raises:
            ValueError: before any call.
        """
        return (self._margin().abs() > 1).all(dim=0)

    @property
    def dead(self) -> Tensor:
        """Bool (num_gates,): saturated gates that were closed for the whole last batch.

        Raises:
            ValueError: before any call.
        """
        return (self._margin() < -1).all(dim=0)

    def _margin(self) -> Tensor:
        if self.logits is None:
            raise ValueError(f"{type(self).__name__}: run a forward pass before reading `saturated` or `dead`")
        calls = [decision.logits for decision in self._noted] or [self.logits]
        return torch.cat([self.estimator.margin(logits.detach()) for logits in calls])

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is (N, C, H, W) of a size that the gate was built for."""
        if x.dim() != 4:
            raise ValueError(f"{type(self).__name__}: input must be (N, C, H, W), got shape {tuple(x.shape)}")

    def forward(self, x: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Decide for a batch.

        Args:
            x: (N, C, H, W), any floating dtype.
            pooled: (N, C), the mean of x over H and W where its producer has it already; saves reading x
            again.

        Returns:
            (N, num_gates) in x.dtype, every value exactly 0 or 1. In training with N = 1 the hidden layer's norm
            uses its running statistics and leaves them as they are.
        """
        self.check_input(x)
        if self.calls == 1:
            self.forget()
        features = x if pooled is None or self.pool != "avg" else pooled
        arguments = self.arguments(x.shape[0], x.dtype)
        if self.synchronized:
            return self.note(compute_gate(features, *arguments, normalize=self.norm))
        return self.note(ops.gate(features, *arguments))

    @property
    def synchronized(self) -> bool:
        """Whether the norm uses the batches of all ranks, which the operators of `gatedconv.ops` do not."""
        return isinstance(self.norm, SynchronizedNorm) and self.training

    def note(self, decision: ops.GateOutput) -> Tensor:
        """Keep the logits and open rate of the last call, or of the last ``calls`` calls; returns the gate."""
        if self.calls == 1:
            self.logits, self.open_rate = decision.logits, decision.open_rate
            return decision.gate
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_graph_task_id() >= 0:
            return decision.gate  # in a backward pass a checkpoint repeats one of the calls that are noted already
        if self._passed:
            self.forget()  # these calls are of another forward
        self._noted = [*self._noted, decision][-self.calls :]
        self._join()
        plain = not compiling and not torch._C._are_functorch_transforms_active()
        if plain and decision.logits.requires_grad:
            passed = self._passed  # not self, which the graph would keep alive
            decision.logits.register_hook(lambda grad: passed.append(True))
        return decision.gate

    def replace_open_rate(self, open_rate: Tensor) -> None:
        """Put another tensor (num_gates,) in the place of the last call's open rate."""
        if self.calls == 1:
            self.open_rate = open_rate
        else:
            self._noted = [*self._noted[:-1], self._noted[-1]._replace(open_rate=open_rate)]
            self._join()

    def _join(self) -> None:
        self.logits = torch.cat([decision.logits for decision in self._noted])
        rows = max(1, len(self.logits))
        self.open_rate = sum(d.open_rate * (len(d.logits) / rows) for d in self._noted)  # type: ignore[assignment]

    def forget(self) -> None:
        """Drop what belongs to the last calls."""
        super().forget()
        self._noted, self._passed = [], []

    def __getstate__(self) -> dict[str, Any]:
        """Drop what belongs to the last calls."""
        return {**super().__getstate__(), "_noted": [], "_passed": []}

    def arguments(
        self, batch: int, dtype: torch.dtype
    ) -> tuple[ops.GateParameters, ops.GateStatistics, ops.GateOptions, Tensor | None]:
        """The arguments of `gatedconv.ops.gate` after its input, noise of this call included."""
        fc1, norm, fc2, estimator = self.fc1, self.norm, self.fc2, self.estimator
        parameters = ops.GateParameters(None, None, None, None, fc2.weight, fc2.bias)
        statistics = ops.GateStatistics(open_rate=self.running_open_rate, threshold=estimator.running_mean)
        options = ops.GateOptions(
            estimator.name,
            estimator.temperature,
            flatten=self.pool == "flatten",
            training=self.training,
            batch_stats=False,
            momentum=RUNNING_MOMENTUM,
            dtype=dtype,
        )
        if fc1 is not None and norm is not None:
            parameters = ops.GateParameters(fc1.weight, fc1.bias, norm.weight, norm.bias, fc2.weight, fc2.bias)
            statistics = statistics._replace(
                mean=norm.running_mean, var=norm.running_var, batches=norm.num_batches_tracked
            )
            # One sample has no batch statistics: it is normalized by the running ones, as in eval.
            batch_stats = norm.running_mean is None or (norm.training and batch > 1)
            options = replace(options, batch_stats=batch_stats, eps=norm.eps, norm_momentum=norm.momentum)
        return parameters, statistics, options, estimator.draw_noise(batch, self.num_gates, fc2.weight)


class LayerGate(LearnedGate):
    """One decision per sample, whether this layer runs (Table 2 of the paper, left column).

    Global average pool -> dense ``hidden`` -> BatchNorm1d -> ReLU -> dense 1 -> estimator.

    Args:
        in_channels: C of the input.
        hidden: units of the hidden dense layer; None for a single dense layer.
        estimator: "ste", "gumbel", "bernoulli" or "batch_mean".
        temperature: of the Gumbel-softmax; unused by the others.
        device: of the parameters, as of any torch.nn layer.
        dtype: of the parameters.

    Attributes:
        logits: (N, 1) of the last call.
        open_rate: (1,), the mean of the gate over the last batch, differentiable in training.
        running_open_rate: buffer (1,), its running mean over training batches.

    Shape: x (N, in_channels, H, W) -> gate (N, 1) in {0, 1}, x.dtype.

    Raises:
        TypeError, ValueError: arguments out of range; of a call, an input that is not (N, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        *,
        hidden: int | None = 16,
        estimator: str = "ste",
        temperature: float = DEFAULT_TEMPERATURE,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, 1, hidden=hidden, estimator=estimator, temperature=temperature, device=device, dtype=dtype
        )
        self.in_channels = in_channels
        self.pool = "avg"


class ChannelGate(LearnedGate):
    """One decision per sample and channel (Table 2 of the paper, right column).

    Args:
        in_channels: C of the input that the gate reads.
        num_gates: number of gated channels; default ``in_channels``.
        hidden: units of the hidden dense layer; None for a single dense layer (the paper's 1FC).
        pool: "avg" (global average pool, any H and W) or "flatten" (the paper's: every position is a
            feature, which fixes H and W and costs C*H*W*hidden parameters).
        feature_size: H*W, or (H, W), of the input; needed by "flatten" alone.
        estimator: "ste", "gumbel", "bernoulli" or "batch_mean".
        temperature: of the Gumbel-softmax; unused by the others.
        device: of the parameters, as of any torch.nn layer.
        dtype: of the parameters.

    Attributes:
        logits: (N, num_gates) of the last call.
        open_rate: (num_gates,), the mean of the gates over the last batch, differentiable in training.
        running_open_rate: buffer (num_gates,), its running mean over training batches.

    Shape: x (N, in_channels, H, W) -> gate (N, num_gates) in {0, 1}, x.dtype.

    Raises:
        TypeError, ValueError: arguments out of range; of a call, an input that is not (N, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        num_gates: int | None = None,
        *,
        hidden: int | None = 16,
        pool: str = "avg",
        feature_size: int | tuple[int, int] | None = None,
        estimator: str = "ste",
        temperature: float = DEFAULT_TEMPERATURE,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        require_choice("ChannelGate", "pool", pool, POOLS)
        if pool == "flatten" and feature_size is None:
            raise ValueError("ChannelGate: pool='flatten' needs feature_size, the H*W of the input")
        size = math.prod(feature_size) if isinstance(feature_size, tuple) else feature_size
        if size is not None and size < 1:
            raise ValueError(f"ChannelGate: feature_size must be at least 1, got {feature_size!r}")
        positions = size if pool == "flatten" and size is not None else 1
        num_gates = in_channels if num_gates is None else num_gates
        options: dict[str, Any] = {"estimator": estimator, "temperature": temperature, "device": device, "dtype": dtype}
        super().__init__(in_channels * positions, num_gates, hidden=hidden, **options)
        self.in_channels = in_channels
        self.pool = pool
        self.feature_size = size

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is (N, C, H, W) of a size that the gate was built for."""
        super().check_input(x)
        if self.pool == "flatten" and x.shape[2] * x.shape[3] != self.feature_size:
            raise ValueError(
                f"ChannelGate: pool='flatten' was built for H*W = {self.feature_size}, got {tuple(x.shape)}"
            )


class FrozenGate(Gate):
    """A gate that became a constant: the consensus of the samples.

    ``is_open`` (any channel open) is a Python bool, so that code can branch on it without reading a device.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.numel(), device=mask.device)
        self.register_buffer("mask", mask.detach().clone())
        self.running_open_rate.copy_(mask)
        self._note()

    def forget(self) -> None:
        """Keep everything: a constant does not depend on a call."""

    def _note(self) -> None:
        self.is_open = bool(self.mask.any())
        self.open_rate = self.running_open_rate

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note()

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenGate:
        super()._apply(fn, recurse)
        self.open_rate = self.running_open_rate
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` drops: a frozen gate has an open rate without a call."""
        super().__setstate__(state)
        self._note()

    def forward(self, x: Tensor) -> Tensor:
        """Give the mask to every sample: x (N, ...) -> (N, num_gates) in x.dtype."""
        return self.mask.to(x.dtype).expand(x.shape[0], -1)


@dataclass(frozen=True)
class Consensus:
    """The masks that the gates agreed on, and how far they agreed.

    Attributes:
        masks: gate path -> bool (num_gates,), True for open.
        agreement: 0 to 1, the share of (sample, gate) decisions that equal the masks; None where masks
            were given by hand without samples to compare.
        gate_agreement: the same for each gate.
        open_rates: gate path -> (num_gates,), the share of samples for which it was open.
    """

    masks: dict[str, Tensor]
    agreement: float | None
    gate_agreement: dict[str, float]
    open_rates: dict[str, Tensor]
