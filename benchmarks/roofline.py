"""The products and bytes of a training step, and the time of a device that does nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatedconv.gating import eval_mode
from gatedconv.gating.mac_terms import dense_macs
from gatedconv.train.skip_dead import PASSES_PER_STEP

ROUNDS = 10


@dataclass(frozen=True)
class DeviceRates:
    """The best rates of a device, measured: FLOP of large products, bytes of a large copy, read and written."""

    flop_per_ms: float
    bytes_per_ms: float


def measured_rates(device: torch.device, dtype: torch.dtype, size: int = 0) -> DeviceRates:
    """Measure both; ``size`` is the side of the matrices, 0 for 8192 on a GPU and 2048 on a CPU.

    FLOP are those of a matrix product or of a 3x3 convolution, whichever is faster: not every library for matrices is
    at its best on every CPU. float32 multiplies as convolutions do by default: in TF32, where a GPU has it.
    """
    side = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(8 * side * side, device=device)
    target, matmul = torch.empty_like(source), torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        product = 2 * side**3 / _least_ms(lambda: a @ b, device)
    finally:
        matmul.allow_tf32 = before
    copy = _least_ms(lambda: target.copy_(source), device)
    return DeviceRates(max(product, _convolved(side, device, dtype)), 2 * source.numel() * source.element_size() / copy)


def _convolved(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per millisecond of a 3x3 convolution of as many channels and positions as fit into (side, side)."""
    channels, edge = max(16, side // 16), 16
    x = torch.randn(max(1, side // 32), channels, edge, edge, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    took = _least_ms(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device)
    return 2 * weight.numel() * len(x) * edge * edge / took


def _least_ms(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


@torch.no_grad()
def layer_work(model: nn.Module, image: Tensor) -> list[tuple[int, int, int]]:
    """The work of each convolution and linear layer of a network, forward, for one image (1, C, H, W).

    Returns:
        Multiply-accumulates, elements of input and output, elements of weights.
    """
    found: list[tuple[int, int, int]] = []

    def take(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        macs = dense_macs(output.shape, layer.weight.shape)
        found.append((macs, inputs[0].numel() + output.numel(), layer.weight.numel()))

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(take) for layer in layers]
    try:
        with eval_mode(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def pass_ms(work: list[tuple[int, int, int]], batch: int, element: int, rates: DeviceRates) -> float:
    """Milliseconds of a forward pass at these rates: of each layer the longer of multiplying and moving.

    What must move is each layer's input, output and weights, of ``element`` bytes, once; norms, activations and gates
    could all be done on the way.
    """
    return sum(
        max(2 * batch * macs / rates.flop_per_ms, element * (batch * maps + weights) / rates.bytes_per_ms)
        for macs, maps, weights in work
    )


def epoch_ms(
    work: list[tuple[int, int, int]], batch: int, steps: int, tests: int, element: int, rates: DeviceRates
) -> float:
    """Milliseconds of an epoch: a step is a forward pass and, backward, two more; each test image is one forward."""
    one = pass_ms(work, batch, element, rates)
    return one * (PASSES_PER_STEP * steps + tests / batch)
