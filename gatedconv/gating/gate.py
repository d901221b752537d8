"""The base class of every gate: a module that decides, per sample, what stays open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv import ops
from gatedconv.gating.estimators import RUNNING_MOMENTUM, Estimator, make_estimator
from gatedconv.gating.sync_norm import SynchronizedNorm
from gatedconv.ops.gate import decide


class Gate(nn.Module):
    """A set of ``num_gates`` binary decisions per sample.

    Attributes:
        num_gates: number of decisions, one logit each.
        logits: (N, num_gates), of the last call; None before any call.
        open_rate: (num_gates,), mean of the gate over the last batch, differentiable in training;
            None before any call.
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
        """Drop what belongs to the last call."""
        self.logits = self.open_rate = self.global_open_rate = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop what belongs to the last call: tensors of a graph can be neither copied nor pickled."""
        return {**self.__dict__, "logits": None, "open_rate": None, "global_open_rate": None}


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
        self.estimator: Estimator = make_estimator(estimator, num_gates, temperature, owner=name)
        self.estimator.to(device=device)
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
        return self.estimator.margin(self.logits.detach())

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
        self.forget()
        features = x if pooled is None or self.pool != "avg" else pooled
        arguments = self.arguments(x.shape[0], x.dtype)
        if self.synchronized:
            return self.note(decide(features, *arguments, normalize=self.norm))
        return self.note(ops.gate(features, *arguments))

    @property
    def synchronized(self) -> bool:
        """Whether the norm uses the batches of all ranks, which the operators of `gatedconv.ops` do not."""
        return isinstance(self.norm, SynchronizedNorm) and self.training

    def note(self, decision: ops.GateOutput) -> Tensor:
        """Keep the last call's logits and open rate; returns the gate."""
        self.logits, self.open_rate = decision.logits, decision.open_rate
        return decision.gate

    def arguments(
        self, batch: int, dtype: torch.dtype
    ) -> tuple[ops.GateParameters, ops.GateStatistics, ops.GateOptions, Tensor | None]:
        """What `gatedconv.ops.gate` takes besides its input, noise of this call included."""
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


class FrozenGate(Gate):
    """A gate that became a constant: the consensus of the samples.

    ``is_open`` (any channel open) and ``is_full`` (all open) are Python bools, so that code can branch
    on them without reading a device.
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
        self.is_full = bool(self.mask.all())
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
