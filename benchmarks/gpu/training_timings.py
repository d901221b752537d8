"""A whole training step of a CIFAR ResNet, ungated and gated."""

from __future__ import annotations

from typing import Any

import torch

import gatedconv
from benchmarks.harness import Call, Machine, variable
from gatedconv.bench.comparison import Row

# Provider: (gated, GATEDCONV_TRITON, mode of torch.compile, captured). The ungated step is the baseline.
PROVIDERS: dict[str, tuple[bool, str, str | None, bool]] = {
    "ungated graph": (False, "off", None, True),
    "gated eager graph": (True, "off", None, True),
    "gatedconv graph": (True, "auto", None, True),
    "gated compile reduce-overhead": (True, "off", "reduce-overhead", False),
}
EAGER = ("ungated graph", "gated eager graph", "gatedconv graph")
COMPILED = "gated compile reduce-overhead"


def training_step(machine: Machine, depth: int, gate: str | None, batch: int, compiled: str | None) -> Call:
    """Forward, losses, backward and SGD on one batch that stays on the device."""
    torch.manual_seed(0)
    device, size = machine.device, 8 if machine.dry else 32
    model: torch.nn.Module = gatedconv.models.ResNet(depth, gate=gate, input_size=(3, size, size)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    run: Any = machine.compile(model, compiled, False) if compiled else model

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        loss = torch.nn.functional.cross_entropy(run(images).float(), labels)
        if gate is not None:
            loss = loss + 2 * gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def step_rows(machine: Machine, depth: int, gate: str, batch: int, provider: str) -> list[Row]:
    """One provider on one network."""
    gated, mode, compiled, graph = PROVIDERS[provider]
    depth, batch = (8, 4) if machine.dry else (depth, batch)
    with variable("GATEDCONV_TRITON", mode):
        step = training_step(machine, depth, gate if gated else None, batch, compiled)
        values = machine.values([step], graph, inner=compiled is None)
    return [Row("training step", f"resnet{depth} {gate} gates", batch, "float32", provider, **values)]
