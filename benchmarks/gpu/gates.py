"""Stage ``bench-gates``: one gate, forward and backward, against eager PyTorch and torch.compile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gatedconv
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.stages import stage
from benchmarks.gpu.timing import Call, captured, count_launches, measure, peak_bytes

# The stages of a CIFAR ResNet, then a late stage of ResNet-50 at 224x224.
SHAPES = ((16, 32), (32, 16), (64, 8), (1024, 14))
GATES = ("layer", "channel", "channel-flat")
COMPILE_S = 40.0  # a first compilation, generously


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


def make_gate(kind: str, channels: int, size: int) -> gatedconv.gates.Gate:
    """A gate of the paper in training, reading (N, channels, size, size)."""
    torch.manual_seed(0)
    if kind == "layer":
        return gatedconv.LayerGate(channels)
    pool = "flatten" if kind == "channel-flat" else "avg"
    return gatedconv.ChannelGate(channels, pool=pool, feature_size=size * size)


def gate_step(gate: torch.nn.Module, x: Tensor, wrap: Callable[[Call], Call] = lambda call: call) -> Call:
    """Forward and backward: gradients of x and of every parameter, from those of gate and open rate."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return gate(x), gate.open_rate

    run = wrap(forward)
    decision, rate = forward(x)
    incoming = (torch.randn_like(decision), torch.randn_like(rate))
    leaves = [x, *gate.parameters()]

    def step() -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(run(x), leaves, incoming)

    return step


def providers() -> dict[str, tuple[str, str | None, bool]]:
    """Provider: (kernels, mode of torch.compile, captured in a graph)."""
    return {
        "eager": ("off", None, False),
        "compile": ("off", "default", False),
        "compile-reduce-overhead": ("off", "reduce-overhead", False),
        "eager-graph": ("off", None, True),
        "gatedconv": ("auto", None, False),
        "gatedconv-graph": ("auto", None, True),
        "gatedconv-compile": ("auto", "default", False),
    }


@stage("bench-gates")
def bench_gates(session: Session, batches: tuple[int, ...] = (256, 128, 1024)) -> int:
    """Measure until the time is up, the most telling cases first; print the table."""
    cases = [
        (batch, kind, channels, size, dtype)
        for batch in batches
        for dtype in (torch.float32, torch.float16)
        for kind in GATES
        for channels, size in SHAPES
        if not (kind == "channel-flat" and size == 14)  # 200,704 features: nobody's gate
    ]
    for batch, kind, channels, size, dtype in cases:
        case = f"{kind} {channels}x{size}x{size}"
        name = str(dtype).removeprefix("torch.")
        for provider, how in providers().items():
            if not session.has(COMPILE_S if how[1] else 5.0):
                continue
            session.add(measure_gate(case, kind, channels, size, batch, dtype, name, provider, how))
    print(session.table("eager"))
    return 0


def measure_gate(
    case: str,
    kind: str,
    channels: int,
    size: int,
    batch: int,
    dtype: torch.dtype,
    name: str,
    provider: str,
    how: tuple[str, str | None, bool],
) -> Row:
    """One provider on one case; a failure becomes a row that says so."""
    mode, compiled, graph = how
    key = ("gate", case, batch, name, provider)
    torch._dynamo.reset()
    x = torch.randn(batch, channels, size, size, device="cuda", dtype=dtype, requires_grad=True)
    gate = make_gate(kind, channels, size).cuda().train()
    wrap = (lambda f: torch.compile(f, mode=compiled, fullgraph=True)) if compiled else (lambda f: f)
    with kernels(mode):
        try:
            step = gate_step(gate, x, wrap)
            launches = None if graph or compiled == "reduce-overhead" else count_launches(step)
            memory = None if graph or compiled == "reduce-overhead" else peak_bytes(step)
            return Row(
                *key, **measure(captured(step) if graph else step), launches=launches, bytes_peak=memory
            )
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            return Row(*key, note=f"failed: {str(error).splitlines()[0][:120]}")
