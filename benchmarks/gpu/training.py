"""Stages ``bench-resnet56`` and ``bench-resnet110``: a whole training step, ungated and gated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import gatedconv
from benchmarks.gpu.gates import kernels
from benchmarks.gpu.session import Session
from benchmarks.gpu.stages import Case, stage
from benchmarks.gpu.timing import Call, Machine

# provider: (gated, kernels, mode of torch.compile, captured). The ungated step is what the gated ones are held against.
PROVIDERS: dict[str, tuple[bool, str, str | None, bool]] = {
    "ungated": (False, "off", None, False),
    "gated eager": (True, "off", None, False),
    "gatedconv": (True, "auto", None, False),
    "ungated graph": (False, "off", None, True),
    "gated eager graph": (True, "off", None, True),
    "gatedconv graph": (True, "auto", None, True),
    "gated compile": (True, "off", "default", False),
    "gated compile reduce-overhead": (True, "off", "reduce-overhead", False),
    "ungated compile reduce-overhead": (False, "off", "reduce-overhead", False),
    "gatedconv compile": (True, "auto", "default", False),
}
EAGER_S, GRAPH_S, COMPILE_S = 12.0, 20.0, 120.0  # the last for ResNet-56; a deeper network takes longer


def training_step(
    machine: Machine, depth: int, gate: str | None, batch: int, amp: bool, compiled: str | None
) -> Call:
    """Forward, losses, backward and SGD of a CIFAR ResNet on one batch that stays on the device."""
    torch.manual_seed(0)
    device, size = machine.device, 8 if machine.dry else 32
    model: torch.nn.Module = gatedconv.models.ResNet(depth, gate=gate, input_size=(3, size, size)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    run: Any = machine.compile(model, compiled, False) if compiled else model

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16 if machine.dry else torch.float16, enabled=amp):
            logits = run(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        if gate is not None:
            loss = loss + 2 * gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def bench_resnet(session: Session, depth: int) -> Iterator[Case]:
    """Layer gates in fp32 at three batch sizes, channel gates, fp16; what compiles slowly comes last.

    Not all of it fits into one call: the stage is called again until nothing is left out.
    """
    torch.backends.cudnn.benchmark = True
    machine = Machine(session.dry)
    cases = [("layer", batch, False) for batch in (256, 128, 1024)]
    cases += [("channel", 256, False), ("layer", 256, True), ("channel", 128, False), ("layer", 128, True)]
    if session.dry:
        cases, depth = [("layer", 4, False), ("channel", 4, True)], 8
    for slow in (False, True):
        for gate, batch, amp in cases:
            for provider, how in PROVIDERS.items():
                if (how[2] is not None) == slow:
                    yield step_case(machine, depth, gate, batch, amp, provider)


def step_case(machine: Machine, depth: int, gate: str, batch: int, amp: bool, provider: str) -> Case:
    """One provider on one network."""
    gated, mode, compiled, graph = PROVIDERS[provider]
    key = ("training", f"resnet{depth} {gate} gates", batch, "float16" if amp else "float32", provider)

    def run() -> dict[str, Any]:
        machine.clean()
        with kernels(mode):
            step = training_step(machine, depth, gate if gated else None, batch, amp, compiled)
            return machine.values(step, graph, inner=compiled != "reduce-overhead")

    seconds = COMPILE_S * max(depth, 56) / 56 if compiled else GRAPH_S if graph else EAGER_S
    return Case(key, seconds, run)


@stage("bench-resnet56", baseline="ungated")
def bench_resnet56(session: Session) -> Iterator[Case]:
    """ResNet-56 on CIFAR-sized images."""
    return bench_resnet(session, 56)


@stage("bench-resnet110", baseline="ungated")
def bench_resnet110(session: Session) -> Iterator[Case]:
    """ResNet-110 on CIFAR-sized images."""
    return bench_resnet(session, 110)
