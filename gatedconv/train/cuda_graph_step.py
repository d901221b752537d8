"""Training steps as CUDA graphs: forward, losses, backward, optimizer and metrics in one launch.

A CIFAR ResNet consists of thousands of small kernels; launched one by one, the GPU waits for the host.
`torch.cuda.make_graphed_callables` captures the forward and backward of a module, but neither losses, optimizer nor
metrics. A step captured here computes what `Stepper` computes: the same operations on the same numbers, except for
the learning rate, which is on the device and rounded to float32 there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv._cuda_graph import capture, on_stream
from gatedconv._io import first_line
from gatedconv.gating import find_gates
from gatedconv.train.config import TrainConfig
from gatedconv.train.distributed import SINGLE, Ranks
from gatedconv.train.optimizer import learning_rate
from gatedconv.train.recipe import GateWeights, gate_weights
from gatedconv.train.step import Stepper, StepResult

# Steps made op by op before a capture: kernels are compiled, cuDNN chooses, caches are filled.
WARM_UP = 3


def make_stepper(
    model: nn.Module, config: TrainConfig, device: torch.device, ranks: Ranks = SINGLE, **options: Any
) -> Stepper:
    """The kind of `Stepper` that `config` selects, with the arguments of `Stepper`.

    Raises:
        ValueError: `cuda_graph` without a GPU, or with several processes.
    """
    return (CudaGraphStepper if config.cuda_graph else Stepper)(model, config, device, ranks, **options)


def require_graphs(device: torch.device, ranks: Ranks = SINGLE) -> None:
    """Check that steps can be captured: ValueError without a GPU, or with several processes."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a GPU, got device {device.type!r}")
    if ranks.world > 1:
        raise ValueError(f"cuda_graph: expected one process, got {ranks.world}")


class CudaGraphStepper(Stepper):
    """A `Stepper` whose step can be captured: static tensor addresses, no host synchronization.

    Images, labels, a teacher's logits, learning rates and the weights of the losses on the gates are copied into
    static buffers before each step. What reads values, pruning in order of rank and the check for bad steps, comes
    between steps, as on any GPU; no blocks are skipped. A graph is used as long as a step has the same operations on
    the same shapes; otherwise another one is captured.

    Args:
        capture: replay CUDA graphs; False runs the same function op by op, on any device.
        options: the other arguments of `Stepper`.

    Raises:
        ValueError: no GPU to capture on, or several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = SINGLE,
        *,
        capture: bool = True,
        **options: Any,
    ) -> None:
        if capture:
            require_graphs(device, ranks)
        super().__init__(model, replace(config, skip_blocks=False), device, ranks, **options)
        self._immediate = False
        self._capture = capture
        self._stream = torch.cuda.Stream(device) if capture else None
        self._rates = [_Scalar(device) for _ in self.optimizer.param_groups]
        self._scalars = {name: _Scalar(device) for name in GateWeights._fields}
        self._inputs: tuple[Tensor, ...] = ()
        self._replay: _Replay | None = None
        self._kind: Any = None
        self._warm = 0

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: float, teacher_logits: Tensor | None = None
    ) -> StepResult:
        """Make a step, as `Stepper` does; the result is valid until the next step."""
        progress = epoch / self.config.epochs
        self._set_inputs(images, labels, teacher_logits, epoch)
        if not self._capture:
            result = self._step()
        elif self._replay is None and self._warm < WARM_UP:
            self._warm += 1
            result = self._step_on_stream()
        else:
            if self._replay is None:
                self._replay = self._captured()
            else:
                self.macs.add(len(images))
            result = self._replay()
        self._after_step(progress)
        return result

    def _set_inputs(self, images: Tensor, labels: Tensor, teacher_logits: Tensor | None, epoch: float) -> None:
        """Copy what a step depends on into the static buffers."""
        inputs = (images, labels) if teacher_logits is None else (images, labels, teacher_logits)
        weights = gate_weights(self.config, epoch / self.config.epochs)
        kind = [(each.shape, each.stride(), each.dtype) for each in inputs], weights.mac_share is None
        if kind != self._kind:
            self._kind, self._replay, self._warm = kind, None, 0
            self._inputs = tuple(torch.empty_like(each) for each in inputs)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        rate = learning_rate(self.config, epoch)
        for group, scalar in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * group["lr_factor"]
            scalar.set(group["lr"])
        for scalar, weight in zip(self._scalars.values(), weights, strict=True):
            if weight is not None:
                scalar.set(float(weight))
        self._has_mac_share = weights.mac_share is not None

    def _loss_weights(self, progress: float) -> GateWeights:
        found = GateWeights(*(scalar.value for scalar in self._scalars.values()))
        return found if self._has_mac_share else found._replace(mac_share=None)

    def _step(self) -> StepResult:
        """The step itself, from the static buffers to tensors."""
        images, labels, *teacher_logits = self._inputs
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]  # numbers, for checkpoints
        for group, scalar in zip(groups, self._rates, strict=True):
            group["lr"] = scalar.value
        try:
            # `_set_inputs` has evaluated the schedules: the progress is not used.
            result = self._update(
                self._forward_backward(images, labels, 0.0, teacher_logits[0] if teacher_logits else None)
            )
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate
        self.observe(result, labels)
        return result

    def _step_on_stream(self) -> StepResult:
        """The step op by op on the stream of the capture: autograd stays on the stream of the first backward pass."""
        assert self._stream is not None
        with on_stream(self._stream):
            return self._step()

    def _captured(self) -> _Replay:
        try:
            # No retry: the failed attempt has changed counters and schedules on the host.
            graph, result = capture(self._step, self.device, self._stream, retries=0)
        except RuntimeError as error:
            raise ValueError(
                f"cuda_graph: this network cannot be captured; train without it ({first_line(error)})"
            ) from error
        return _Replay(graph, result, self.model)


class _Scalar:
    """A scalar tensor on the device, float32 ()."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros((), device=device)
        self._last = 0.0

    def set(self, number: float) -> None:
        """Change the value, if it differs, without a copy from the host's memory."""
        if number != self._last:
            self.value.fill_(number)
            self._last = number


class _Replay:
    """A captured step.

    What gates and losses keep of a batch are tensors of the graph; they are put back where another pass, such as an
    evaluation, replaced them.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, result: StepResult, model: nn.Module) -> None:
        self._graph, self._result = graph, result
        self._shown = [
            (gate, gate.logits, gate.open_rate, gate.global_open_rate)
            for gate in find_gates(model).values()
            if gate.logits is not None
        ]

    def __call__(self) -> StepResult:
        self._graph.replay()
        if self._shown and self._shown[0][0].open_rate is not self._shown[0][2]:
            for gate, logits, open_rate, global_open_rate in self._shown:
                gate.logits, gate.open_rate, gate.global_open_rate = logits, open_rate, global_open_rate
        return self._result
