"""Evaluations as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gatedconv._cuda_graph import capture
from gatedconv._io import first_line
from gatedconv.gating import LayerGate, find_gates


def make_forward(
    model: nn.Module, cuda_graph: bool, on_note: Callable[[str], object] = warnings.warn
) -> Callable[[Tensor], Tensor]:
    """The forward pass for evaluations: the network, or with `cuda_graph` its replay.

    In eval mode the host decides which samples a layer gate lets through: such a network is not captured.
    """
    decides = any(isinstance(gate, LayerGate) for gate in find_gates(model).values())
    return CudaGraphForward(model, on_note=on_note) if cuda_graph and not decides else model


class CudaGraphForward:
    """A network in eval mode and without gradients, replayed for batches of the first one's shape.

    Other batches run without a graph, and so do all where the network cannot be captured.

    Args:
        model: the network, whose parameters and buffers keep their addresses.
        capture: replay a CUDA graph; False runs the same op by op, on any device.
        on_note: called once where the network cannot be captured.
    """

    def __init__(
        self, model: nn.Module, *, capture: bool = True, on_note: Callable[[str], object] = warnings.warn
    ) -> None:
        self._model, self._capture, self._on_note = model, capture, on_note
        self._images: Tensor | None = None
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes), valid until the next call."""
        if self._images is None:  # compiles kernels, and lets cuDNN choose
            self._images = torch.empty_like(images)
            return self._forward(images)
        if images.shape != self._images.shape or images.stride() != self._images.stride():
            return self._forward(images)
        self._images.copy_(images)
        if self._capture and self._graph is None:
            self._try_capture(self._images)
        if self._graph is None or self._logits is None:
            return self._forward(self._images)
        self._graph.replay()
        return self._logits

    def _try_capture(self, images: Tensor) -> None:
        try:
            self._graph, self._logits = capture(partial(self._forward, images), images.device)
        except RuntimeError as error:
            self._capture = False
            self._on_note(f"cuda_graph: evaluations run without a graph, capture failed ({first_line(error)})")

    def _forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self._model(images)
        return logits
