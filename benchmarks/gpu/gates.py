"""Stage ``bench-gates``: one gate, forward and backward, against eager PyTorch and torch.compile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gatedconv
from benchmarks.gpu.session import Session
from benchmarks.gpu.stages import Case, stage
from benchmarks.gpu.timing import Call, Machine

# The stages of a CIFAR ResNet, then a late stage of ResNet-50 at 224x224.
SHAPES = ((16, 32), (32, 16), (64, 8), (1024, 14))
DRY_SHAPES = ((3, 4),)
GATES = ("layer", "channel", "channel-flat")
ESTIMATORS = ("gumbel", "bernoulli", "batch_mean")  # beside "ste", for which everything is measured
EAGER_S, COMPILE_S = 5.0, 40.0  # a first compilation, generously

# Provider: (kernels, mode of torch.compile, captured in a graph).
PROVIDERS: dict[str, tuple[str, str | None, bool]] = {
    "eager": ("off", None, False),
    "gatedconv": ("auto", None, False),
    "gatedconv-graph": ("auto", None, True),
    "eager-graph": ("off", None, True),
    "compile-reduce-overhead": ("off", "reduce-overhead", False),
    "compile": ("off", "default", False),
    "gatedconv-compile": ("auto", "default", False),
    "gatedconv-compile-reduce-overhead": ("auto", "reduce-overhead", False),
}


@contextlib.contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Turn our kernels on ("auto") or off ("off")."""
    before = os.environ.get("GATEDCONV_TRITON")
    os.environ["GATEDCONV_TRITON"] = mode
    try:
        yield
    finally:
        os.environ.pop("GATEDCONV_TRITON")
        if before is not None:
            os.environ["GATEDCONV_TRITON"] = before


def make_gate(kind: str, channels: int, size: int, **options: Any) -> gatedconv.gates.Gate:
    """A gate of the paper in training, reading (N, channels, size, size)."""
    torch.manual_seed(0)
    if kind == "layer":
        return gatedconv.LayerGate(channels, **options)
    pool = "flatten" if kind == "channel-flat" else "avg"
    return gatedconv.ChannelGate(channels, pool=pool, feature_size=size * size, **options)


def gate_step(gate: torch.nn.Module, x: Tensor, wrap: Callable[..., Any] = lambda call: call) -> Call:
    """Forward and backward: gradients of x and of every parameter, from those of gate and open rate."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return gate(x), gate.open_rate

    run = wrap(forward)
    with torch.no_grad():  # leaves no autograd graph behind, whose nodes would be bound to this stream
        decision, rate = forward(x)
    incoming = (torch.randn_like(decision), torch.randn_like(rate))
    leaves = [x, *gate.parameters()]

    def step() -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(run(x), leaves, incoming)

    return step


@stage("bench-gates", baseline="eager")
def bench_gates(session: Session) -> Iterator[Case]:
    """Batch 256 first, every provider; then the other estimators, batches and depths by eager and ours.

    What compiles takes ten times as long: it comes after every gate's other rows, the mode that has a goal first.
    """
    machine = Machine(session.dry)
    shapes = DRY_SHAPES if session.dry else SHAPES
    batches = (4,) if session.dry else (256, 128, 1024)
    quick = [name for name, (_, mode, _) in PROVIDERS.items() if mode is None]
    compiled = sorted(set(PROVIDERS) - set(quick), key=lambda name: (name != "compile-reduce-overhead", name))
    kinds = [(kind, *shape) for kind in GATES for shape in shapes]
    kinds = [kind for kind in kinds if kind != ("channel-flat", 1024, 14)]  # 200,704 features: nobody's gate
    for batch in batches:
        for dtype in (torch.float32, torch.float16):
            for providers in (quick, *([name] for name in compiled)):
                for kind, channels, size in kinds:
                    for provider in providers:
                        yield gate_case(machine, kind, channels, size, batch, dtype, provider)
        if batch == batches[0]:
            for kind in GATES:
                for options in (*({"estimator": name} for name in ESTIMATORS), {"hidden": None}):
                    for provider in quick:
                        yield gate_case(machine, kind, *shapes[0], batch, torch.float32, provider, **options)


def gate_case(
    machine: Machine, kind: str, channels: int, size: int, batch: int, dtype: torch.dtype, provider: str, **options: Any
) -> Case:
    """One provider on one gate."""
    words = [kind, f"{channels}x{size}x{size}", *("1FC" if value is None else str(value) for value in options.values())]
    key = ("gate", " ".join(words), batch, str(dtype).removeprefix("torch."), provider)
    mode, compiled, graph = PROVIDERS[provider]

    def run() -> dict[str, Any]:
        machine.clean()
        device = machine.device
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype, requires_grad=True)
        gate = make_gate(kind, channels, size, **options).to(device).train()
        wrap = (lambda f: machine.compile(f, compiled, True)) if compiled else (lambda f: f)
        with kernels(mode):
            return machine.values(gate_step(gate, x, wrap), graph, inner=compiled != "reduce-overhead")

    return Case(key, COMPILE_S if compiled else EAGER_S, run)
