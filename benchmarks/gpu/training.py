"""Stages ``bench-resnet56`` and ``bench-resnet110``: a whole training step, ungated and gated."""

from __future__ import annotations

from typing import Any

import torch

import gatedconv
from benchmarks.gpu.gates import kernels
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.stages import stage
from benchmarks.gpu.timing import Call, captured, count_launches, measure, peak_bytes

# provider: (gated, kernels, compiled, captured). The ungated step is what the gated ones are held against.
PROVIDERS = {
    "ungated": (False, "off", False, False),
    "gated eager": (True, "off", False, False),
    "gatedconv": (True, "auto", False, False),
    "ungated graph": (False, "off", False, True),
    "gated eager graph": (True, "off", False, True),
    "gatedconv graph": (True, "auto", False, True),
    "gated compile": (True, "off", True, False),
    "gatedconv compile": (True, "auto", True, False),
}
EAGER_S, GRAPH_S, COMPILE_S = 12.0, 20.0, 150.0


def training_step(depth: int, gate: str | None, batch: int, amp: bool, compiled: bool) -> Call:
    """Forward, losses, backward and SGD of a CIFAR ResNet on one batch that stays on the device."""
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(gatedconv.models, f"resnet{depth}")(gate=gate).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, 32, 32, device="cuda")
    labels = torch.randint(10, (batch,), device="cuda")
    run: Any = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.float16, enabled=amp):
            logits = run(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        if gate is not None:
            loss = loss + 2 * gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def bench_resnet(session: Session, depth: int) -> int:
    """Layer gates in fp32 at three batch sizes, channel gates, fp16; what compiles slowly comes last."""
    torch.backends.cudnn.benchmark = True
    cases = [("layer", batch, False) for batch in (256, 128, 1024)]
    cases += [("channel", 256, False), ("layer", 256, True), ("channel", 128, False), ("layer", 128, True)]
    for slow in (False, True):
        for gate, batch, amp in cases:
            for provider, how in PROVIDERS.items():
                if how[2] == slow and session.has(COMPILE_S if slow else GRAPH_S if how[3] else EAGER_S):
                    session.add(measure_step(depth, gate, batch, amp, provider, how))
    print(session.table("ungated"))
    return 0


def measure_step(
    depth: int, gate: str, batch: int, amp: bool, provider: str, how: tuple[bool, str, bool, bool]
) -> Row:
    """One provider on one case; a failure becomes a row that says so."""
    gated, mode, compiled, graph = how
    key = ("training", f"resnet{depth} {gate} gates", batch, "float16" if amp else "float32", provider)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    with kernels(mode):
        try:
            step = training_step(depth, gate if gated else None, batch, amp, compiled)
            launches = None if graph else count_launches(step)
            memory = None if graph else peak_bytes(step)
            return Row(
                *key, **measure(captured(step) if graph else step), launches=launches, bytes_peak=memory
            )
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            return Row(*key, note=f"failed: {str(error).splitlines()[0][:120]}")


@stage("bench-resnet56")
def bench_resnet56(session: Session) -> int:
    """ResNet-56 on CIFAR-sized images."""
    return bench_resnet(session, 56)


@stage("bench-resnet110")
def bench_resnet110(session: Session) -> int:
    """ResNet-110 on CIFAR-sized images."""
    return bench_resnet(session, 110)
