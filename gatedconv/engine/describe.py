"""What an engine runs where, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.engine.cuda.plan import CudaPlan
from gatedconv.engine.program import Map, Step
from gatedconv.ops.plan import plan_isa, plan_workspace

if TYPE_CHECKING:
    from gatedconv.engine.engine import Engine

_KERNELS = {"conv": "direct", "winograd2": "Winograd F(2x2)", "winograd4": "Winograd F(4x4)"}


def describe(engine: Engine) -> str:
    """Return one line for each layer and sums at the end."""
    if engine.reason is not None:
        return f"Everything runs in PyTorch: {engine.reason}."
    size = " x ".join(map(str, engine.example_size))
    lines = [f"Engine for inputs of {size}; {_machine(engine)}."]
    plans = {
        name: module for name, module in engine.body.named_children() if isinstance(module, (PlanModule, CudaPlan))
    }
    rest = []
    assert isinstance(engine.body, torch.fx.GraphModule)
    for node in engine.body.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if str(node.target) in plans:
            lines += _describe_plan(str(node.target), plans[str(node.target)], engine)
        else:
            lines.append(f"PyTorch: {node.name} ({_kind(engine, node)})")
            rest.append(node.name)
    lines.append(f"In PyTorch: {len(rest)} operations." if rest else "Nothing is left to PyTorch.")
    return "\n".join(lines)


def _kind(engine: Engine, node: torch.fx.Node) -> str:
    if node.op == "call_module":
        return type(engine.body.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))


def _machine(engine: Engine) -> str:
    if engine.device.type == "cpu":
        return f"native kernels: {plan_isa()}, {torch.get_num_threads()} threads"
    modes = {plan.mode for plan in engine.plans if isinstance(plan, CudaPlan)}
    return f"{engine.device}, {engine.dtype}, GATEDCONV_CUDA_KERNELS: {', '.join(sorted(modes)) or 'no plan'}"


def _describe_plan(name: str, plan: PlanModule | CudaPlan, engine: Engine) -> list[str]:
    if isinstance(plan, CudaPlan):
        lines = [f"{name}: {len(plan.instructions)} instructions in one graph"]
        lines += ["  " + line for line in plan.describe(engine.example_size[0])]
        macs = sum(one.macs for one in plan.instructions)
        return [*lines, f"  in all {macs / 1e6:.2f} M MACs an image"]
    lines = [f"{name}: {len(plan.steps)} instructions in one call"]
    lines += ["  " + _describe_step(step, plan.maps) for step in plan.steps if step.layer is not None]
    macs = sum(step.macs for step in plan.steps)
    weights = plan.weights.numel() * plan.weights.element_size()
    first = plan.maps[plan.steps[0].target]
    size = (engine.example_size[0], first.channels, first.height, first.width)
    workspace = plan_workspace(size, plan.program, torch.get_num_threads())
    lines.append(
        f"  in all {macs / 1e6:.2f} M MACs an image, weights {_bytes(weights)}, "
        f"workspace {_bytes(workspace)} at batch {size[0]}"
    )
    return lines


def _describe_step(step: Step, maps: list[Map]) -> str:
    layer = step.layer
    assert layer is not None
    target, source = maps[step.target], maps[step.source]
    kernel = " ".join((_KERNELS.get(step.op, step.op), f"{layer.kernel[0]}x{layer.kernel[1]}"))
    if layer.kind not in ("conv", "max_pool", "avg_pool"):
        kernel = "view" if step.op == "view" else step.op
    extras = [f"stride {layer.stride[0]}"] if layer.stride != (1, 1) else []
    extras += [f"{layer.groups} groups"] if layer.groups > 1 else []
    if layer.before is not None:
        extras.append("of norm" + (f" and {layer.before[2]}" if layer.before[2] else ""))
    extras += ["of gated input"] if step.gate >= 0 else []
    extras += ["+ residual"] if step.residual >= 0 and layer.kind == "conv" else []
    extras += [f"+ {layer.act}"] if layer.act else []
    shape = " -> ".join(f"{m.channels}x{m.height}x{m.width}" for m in (source, target))
    line = f"{layer.name:<28} {shape:<28} {' '.join([kernel, *extras])}"
    return line + (f"; {step.macs / 1e6:.2f} M MACs, {_bytes(step.weight_bytes)}" if step.macs else "")


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"
