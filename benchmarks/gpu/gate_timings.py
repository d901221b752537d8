"""A gate, and its product with a map, in training, forward and backward: ours, eager PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gatedconv
from benchmarks.harness import Call, Machine, variable
from gatedconv.bench.comparison import Row

# Provider: (GATEDCONV_TRITON, mode of torch.compile, captured in a graph).
PROVIDERS: dict[str, tuple[str, str | None, bool]] = {
    "eager": ("off", None, False),
    "eager graph": ("off", None, True),
    "gatedconv": ("auto", None, False),
    "gatedconv graph": ("auto", None, True),
    "compile reduce-overhead": ("off", "reduce-overhead", False),
}
EAGER = ("eager", "eager graph", "gatedconv", "gatedconv graph")
COMPILED = ("compile reduce-overhead",)
BATCH = 256


def make_gate(kind: str, channels: int, size: int) -> torch.nn.Module:
    """A gate of the paper in training mode, for input (N, channels, size, size)."""
    torch.manual_seed(0)
    if kind == "layer":
        return gatedconv.LayerGate(channels).train()
    pool = "flatten" if kind == "channel-flat" else "avg"
    return gatedconv.ChannelGate(channels, pool=pool, feature_size=size * size).train()


def gate_steps(gate: torch.nn.Module, inputs: list[Tensor], wrap: Callable[..., Any] = lambda call: call) -> list[Call]:
    """One call per input: gradients of the input and of every parameter, from those of gate and open rate."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return gate(x), gate.open_rate  # type: ignore[return-value]

    run = wrap(forward)
    with torch.no_grad():  # makes no autograd graph, whose nodes would be bound to this stream
        decision, rate = forward(inputs[0])
    incoming = (torch.randn_like(decision), torch.randn_like(rate))

    def step(x: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(run(x), [x, *gate.parameters()], incoming)

    return [partial(step, x) for x in inputs]


def scale_steps(gate: Tensor, inputs: list[Tensor], wrap: Callable[..., Any] = lambda call: call) -> list[Call]:
    """One call per input: gradients of the input and of the gate (N, C) from those of `gated_scale`."""
    run = wrap(gatedconv.ops.gated_scale)
    incoming = torch.randn_like(inputs[0])

    def step(x: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(run(x, gate), [x, gate], incoming)

    return [partial(step, x) for x in inputs]


def gate_rows(machine: Machine, kind: str, channels: int, size: int, providers: tuple[str, ...] = EAGER) -> list[Row]:
    """Every provider on one gate."""
    size = 4 if machine.dry else size

    def steps(inputs: list[Tensor], wrap: Callable[..., Any]) -> list[Call]:
        return gate_steps(make_gate(kind, channels, size).to(machine.device), inputs, wrap)

    return _rows(machine, "gate", f"{kind} {channels}x{size}x{size}", (channels, size, size), providers, steps)


def gated_scale_rows(machine: Machine, channels: int, size: int, providers: tuple[str, ...] = EAGER) -> list[Row]:
    """Every provider on the product of a map and its gate, a third of whose channels are closed."""
    size = 4 if machine.dry else size

    def steps(inputs: list[Tensor], wrap: Callable[..., Any]) -> list[Call]:
        shape = inputs[0].shape[:2]
        gate = (torch.arange(shape.numel(), device=machine.device) % 3 > 0).float().view(shape)
        return scale_steps(gate.requires_grad_(), inputs, wrap)

    return _rows(machine, "gated_scale", f"{channels}x{size}x{size}", (channels, size, size), providers, steps)


def _rows(
    machine: Machine,
    benchmark: str,
    case: str,
    shape: tuple[int, int, int],
    providers: tuple[str, ...],
    make_steps: Callable[[list[Tensor], Callable[..., Any]], list[Call]],
) -> list[Row]:
    """Every provider; inputs rotate beyond the L2 cache, except under torch.compile's own graphs.

    Launches of a small gate may take the host longer than the GPU: the note of an eager row has the host's share.
    """
    batch, rows = (4 if machine.dry else BATCH), []
    for provider in providers:
        mode, compiled, graph = PROVIDERS[provider]
        make = lambda: torch.randn(batch, *shape, device=machine.device, requires_grad=True)  # noqa: E731
        inputs = [make()] if compiled else machine.copies(make)
        wrap = (lambda f, m=compiled: machine.compile(f, m, True)) if compiled else (lambda f: f)
        with variable("GATEDCONV_TRITON", mode):
            steps = make_steps(inputs, wrap)
            values = machine.values(steps, graph, inner=compiled is None)
            note = None if compiled or graph else f"the host alone: {machine.host_ms(steps[0]):.3f} ms"
        note = "one input, which may be read from L2" if compiled else note
        rows.append(Row(benchmark, case, batch, "float32", provider, note=note, **values))
    return rows
