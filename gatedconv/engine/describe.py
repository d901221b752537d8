"""The report of `Engine.describe`: which layer runs where, by which kernel, with how many MACs and bytes."""

from __future__ import annotations

from torch import fx

from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.engine.cuda.cuda_plan import CudaPlan
from gatedconv.engine.cuda.instructions import Instruction
from gatedconv.engine.idioms import name_of
from gatedconv.engine.layers import Layer
from gatedconv.engine.maps import Map, Step
from gatedconv.ops.plan import plan_passing, plan_workspace

_KERNELS = {"conv": "direct", "bf16": "bf16", "winograd2": "Winograd F(2x2)", "winograd4": "Winograd F(4x4)"}


def describe_body(body: fx.GraphModule, batch: int, threads: int) -> list[str]:
    """The lines about a network whose segments are plans.

    Args:
        body: calls the plans, and what runs in PyTorch.
        batch: images for which the workspace is given.
        threads: of the plans on the CPU.
    """
    plans = {name: module for name, module in body.named_children() if isinstance(module, (PlanModule, CudaPlan))}
    lines, rest = list[str](), 0
    for node in body.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        plan = plans.get(str(node.target))
        if isinstance(plan, CudaPlan):
            lines.append(f"{node.target}: {len(plan.instructions)} instructions in one graph")
            lines += ["  " + line for line in cuda_plan_lines(plan, batch)]
            lines.append(f"  in all {sum(one.macs for one in plan.instructions) / 1e6:.2f} M MACs an image")
        elif plan is not None:
            lines += _cpu_plan(str(node.target), plan, batch, threads)
        else:
            lines.append(f"PyTorch: {node.name} ({_operation(body, node)})")
            rest += 1
    return [*lines, f"In PyTorch: {rest} operations." if rest else "Nothing is left to PyTorch."]


def _operation(body: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(body.get_submodule(str(node.target))).__name__
    return name_of(node)


def cuda_plan_lines(plan: CudaPlan, batch: int) -> list[str]:
    """One line for each instruction: its layer, maps and candidate, for inputs of the example's size."""
    first = plan.maps[plan.first]
    size = (batch, first.channels, first.height, first.width)
    chosen, runs = plan.chosen.get(size), plan.runs.get(size, {}).values()
    lines = []
    for at, one in enumerate(plan.instructions):
        launch = next((f"{name}, one launch" for run, name in runs if run.start <= at < run.end), "")
        candidate = launch or ("PyTorch" if one.op != "conv" else chosen[at] if chosen else "not measured yet")
        kernel = f"conv {one.kernel[0]}x{one.kernel[1]}" if one.op == "conv" else one.op
        extras = [f"from {len(one.in_index)} channels"] if one.in_index is not None else []
        extras += [f"into {len(one.out_index)} channels"] if one.out_index is not None else []
        extras += ["+ residual"] if one.residual >= 0 and one.op == "conv" else []
        lines.append(f"{_layer(one, plan.maps[one.source], plan.maps[one.target], kernel, extras)} [{candidate}]")
    return lines


def _cpu_plan(name: str, plan: PlanModule, batch: int, threads: int) -> list[str]:
    lines = [f"{name}: {len(plan.steps)} instructions in one call"]
    first = plan.maps[plan.steps[0].target]
    size = (batch, first.channels, first.height, first.width)
    passing = iter(plan_passing(size, plan.program))
    for step in plan.steps:
        passes = step.op != "view" and next(passing)
        if step.layer is not None:
            lines.append("  " + _step(step, plan.maps) + ", read band by band" * passes)
    macs = sum(step.macs for step in plan.steps)
    weights = plan.weights.numel() * plan.weights.element_size()
    workspace = plan_workspace(size, plan.program, threads)
    lines.append(
        f"  in all {macs / 1e6:.2f} M MACs an image, weights {_bytes(weights)}, "
        f"workspace {_bytes(workspace)} at batch {batch}"
    )
    return lines


def _step(step: Step, maps: list[Map]) -> str:
    layer = step.layer
    assert layer is not None
    kernel = " ".join((_KERNELS.get(step.op, step.op), f"{layer.kernel[0]}x{layer.kernel[1]}"))
    if layer.kind not in ("conv", "max_pool", "avg_pool"):
        kernel = step.op
    extras = []
    if layer.before is not None:
        extras.append("of norm" + (f" and {layer.before[2]}" if layer.before[2] else ""))
    extras += ["of gated input"] if step.gate >= 0 else []
    extras += ["+ residual"] if step.residual >= 0 and layer.kind == "conv" else []
    line = _layer(layer, maps[step.source], maps[step.target], kernel, extras)
    return line + (f"; {step.macs / 1e6:.2f} M MACs, {_bytes(step.weight_bytes)}" if step.macs else "")


def _layer(one: Layer | Instruction, source: Map, target: Map, kernel: str, extras: list[str]) -> str:
    """The name of a layer, the sizes of its maps, and what it computes."""
    stride = [f"stride {one.stride[0]}"] if one.stride != (1, 1) else []
    groups = [f"{one.groups} groups"] if one.groups > 1 else []
    act = [f"+ {one.act}"] if one.act else []
    shape = " -> ".join(f"{m.channels}x{m.height}x{m.width}" for m in (source, target))
    return f"{one.name:<28} {shape:<28} {' '.join([kernel, *stride, *groups, *extras, *act])}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"
