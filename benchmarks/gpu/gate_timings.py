"""One gate in training, forward and backward: ours, eager PyTorch and torch.compile."""

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


def gate_rows(machine: Machine, kind: str, channels: int, size: int, providers: tuple[str, ...] = EAGER) -> list[Row]:
    """Every provider on one gate; inputs rotate beyond the L2 cache, except under torch.compile's own graphs.

    Launches of a small gate may take the host longer than the GPU: the note of an eager row has the host's share.
    """
    batch, rows = (4 if machine.dry else BATCH), []
    size = 4 if machine.dry else size
    for provider in providers:
        mode, compiled, graph = PROVIDERS[provider]
        gate = make_gate(kind, channels, size).to(machine.device)
        make = lambda: torch.randn(batch, channels, size, size, device=machine.device, requires_grad=True)  # noqa: E731
        inputs = [make()] if compiled else machine.copies(make)
        wrap = (lambda f, m=compiled: machine.compile(f, m, True)) if compiled else (lambda f: f)
        with variable("GATEDCONV_TRITON", mode):
            steps = gate_steps(gate, inputs, wrap)
            values = machine.values(steps, graph, inner=compiled is None)
            note = None if compiled or graph else f"the host alone: {machine.host_ms(steps[0]):.3f} ms"
        note = "one input, which may be read from L2" if compiled else note
        rows.append(Row("gate", f"{kind} {channels}x{size}x{size}", batch, "float32", provider, note=note, **values))
    return rows
