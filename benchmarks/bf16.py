"""Products in bfloat16 compared with float32 ones, layer by layer, on one thread of a CPU that has instructions for it.

``python -m benchmarks.bf16 [CASE ...]`` interleaves, for each case, the engine's float32 layer at its best algorithm
and the same layer in bfloat16 by each instruction set that the machine has. Cases are those of ``gatedconv bench``,
such as "n1 i96 o24 h56 k1". What is timed is the step of the plan alone, its least time, with the map and the weights
where the call before has left them. ``--save`` keeps the times in a result file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, machine_header, made_by, variable, write_result
from gatedconv.bench.conv_case import ConvCase
from gatedconv.engine import Engine
from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.ops.plan import plan_isa, plan_times, unavailable
from gatedconv.report.tables import markdown_table

# Of MobileNetV2 and V3, EfficientNet-B0, ResNet-18 and 50: 1x1, strided, 3x3, first and last layers.
CASES = (
    "n1 i32 o16 h112 k1",
    "n1 i16 o96 h112 k1",
    "n1 i96 o24 h56 k1",
    "n1 i24 o144 h56 k1",
    "n1 i64 o256 h56 k1",
    "n1 i256 o64 h56 k1",
    "n1 i144 o32 h28 k1",
    "n1 i128 o512 h28 k1",
    "n1 i384 o64 h14 k1",
    "n1 i64 o384 h14 k1",
    "n1 i1024 o256 h14 k1",
    "n1 i576 o160 h7 k1",
    "n1 i512 o2048 h7 k1",
    "n1 i2048 o1000 h1 k1",
    "n8 i256 o1024 h14 k1",
    "n1 i256 o512 h56 k1 s2",
    "n1 i3 o32 h224 k3 s2",
    "n1 i3 o64 h224 k7 s2",
    "n1 i64 o128 h56 k3 s2",
    "n1 i64 o64 h56 k3",
    "n1 i256 o256 h14 k3",
    "n1 i512 o512 h7 k3",
    "n1 i16 o16 h32 k3",
    "n1 i64 o64 h8 k3",
)
ROUNDS, CALLS = 5, 30


def instruction_sets() -> list[str]:
    """Those for bfloat16 that this machine has, the best one first."""
    found = []
    for name in ("amx", "avx512_bf16"):
        with variable("GATEDCONV_ISA", name):
            try:
                found += [name] * (plan_isa(bf16=True) == name)
            except RuntimeError:
                continue
    return found


def time_case(case: ConvCase, isas: Sequence[str], rounds: int = ROUNDS) -> dict[str, float]:
    """The least milliseconds of the layer in float32 and by each instruction set, interleaved."""
    net = nn.Sequential(nn.Conv2d(case.in_channels, case.out_channels, case.kernel, case.stride, case.pad))
    x = torch.randn(case.batch, case.in_channels, *case.size, generator=torch.Generator().manual_seed(0))
    full, half = (_plan(net, x, dtype) for dtype in (torch.float32, torch.bfloat16))
    least = {"float32": math.inf, **dict.fromkeys(isas, math.inf)}
    for _ in range(rounds):
        for name in least:
            with variable("GATEDCONV_ISA", name if name in isas else None):
                plan = half if name in isas else full
                times = [plan_times(x, plan.program, plan.weights, 1) for _ in range(CALLS)]
            least[name] = min(least[name], float(torch.stack(times)[:, 1].min()))  # input, layer, output
    return least


def _plan(net: nn.Module, x: Tensor, dtype: torch.dtype) -> PlanModule:
    (plan,) = Engine(net, x, threads=1, verify=False, dtype=dtype).plans
    assert isinstance(plan, PlanModule) and len(plan.steps) == 3
    return plan


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows: times, and float32 over each instruction set."""
    names = [name for name in rows[0]["ms"] if name != "float32"]
    lines = []
    for row in rows:
        full = row["ms"]["float32"]
        cells = [cell for name in names for cell in (f"{row['ms'][name]:.4f}", f"{full / row['ms'][name]:.2f}")]
        lines.append([row["case"], f"{full:.4f}", *cells])
    header = ["case", "float32 ms", *(title for name in names for title in (f"{name} ms", f"float32 / {name}"))]
    return markdown_table(header, lines, 1)


def gains(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The geometric mean of float32 over each instruction set."""
    names = [name for name in rows[0]["ms"] if name != "float32"]
    return {name: statistics.geometric_mean(row["ms"]["float32"] / row["ms"][name] for row in rows) for name in names}


def section() -> str:
    """The part of docs/performance.md."""
    parts = []
    for path in sorted(RESULTS.glob("bf16-*.json")):
        found = json.loads(path.read_text())
        machine, rows = found["machine"], found["rows"]
        means = " and ".join(f"{gain:.2f} with {name}" for name, gain in gains(rows).items())
        parts.append(
            f"{machine['cpu']}, one thread; {made_by(machine)}. "
            f"Geometric mean of float32 / bfloat16: {means}.\n\n{table(rows)}"
        )
    return "\n\n".join(parts) or "Not measured yet."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bf16", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases [those of shipped networks]")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/bf16-DEVICE.json")
    options = parser.parse_args(arguments)
    if (reason := unavailable()) is not None:
        raise SystemExit(reason)
    isas = instruction_sets()
    if not isas:
        raise SystemExit("this CPU has no instructions for bfloat16")
    torch.set_num_threads(1)
    rows = []
    for text in options.cases or CASES:
        times = time_case(ConvCase.parse(text), isas)
        rows.append({"case": text, "ms": {name: round(ms, 5) for name, ms in times.items()}})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows), gains(rows))
    if options.save:
        machine = machine_header(1)
        write_result(RESULTS / f"bf16-{machine['device']}.json", {"machine": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
