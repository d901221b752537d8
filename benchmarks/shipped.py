"""The networks that people ship, dense and half pruned, in our engine and in ONNX Runtime and OpenVINO.

``python -m benchmarks.shipped`` measures what its result file lacks; ``--minutes`` bounds it, and a second call
continues. Runtimes take turns, as in ``pytest benchmarks``; every row has the median and the fastest call. Rows of ours
say how many GFLOP/s the fastest call is, and which share of the fastest product that PyTorch computes on the same
threads; at batch 1 they list the ten slowest layers, each timed with all threads at it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatedconv
from benchmarks.harness import RESULTS, machine_header
from benchmarks.networks import fill_norms, half_open
from benchmarks.roofline import layer_work, measured_rates
from benchmarks.yolo import Yolo
from gatedconv._io import write_atomic
from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.ops.plan import plan_times
from gatedconv.report.bench import Row, best_rows, compare_runtimes
from gatedconv.report.runtimes import OURS, SETTINGS
from gatedconv.report.tables import markdown_table

NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "densenet121",
    "convnext_tiny",
    "yolov8n",
)
CUTS, BATCHES = ("dense", "mid-50"), (1, 8)
PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
SLOWEST, PROFILES = 10, 20


@dataclass(frozen=True)
class Case:
    """A network, "dense" or "mid-50" (half of the channels inside of its blocks removed at random), and a batch."""

    network: str
    cut: str
    batch: int

    @property
    def name(self) -> str:
        """As result rows call it."""
        return f"{self.network} {self.cut}"


CASES = tuple(Case(*case) for case in itertools.product(NETWORKS, CUTS, BATCHES))


def build(network: str, cut: str, size: int = 224) -> nn.Module:
    """A network in eval mode with random weights, for images (N, 3, size, size).

    Raises:
        ImportError: torchvision is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if network == "yolov8n":
            model: nn.Module = Yolo()
        else:
            import torchvision

            model = getattr(torchvision.models, network)(weights=None)
        fill_norms(model)
        model.eval()
        if cut == "dense":
            return model
        x = torch.randn(1, 3, size, size)
        gated = gatedconv.gate_model(model, gate="channel", position="middle", example_input=x)
        masks = {name: half_open(gate.num_gates) for name, gate in gatedconv.gates(gated).items()}
        return gatedconv.compact(gatedconv.freeze(gated, masks=masks), x)


def slowest_layers(network: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """The layers that take most of a call (1, 3, H, W): name, operation, sizes, the least ms of some calls, GFLOP/s."""
    plans = gatedconv.Engine(network, x, verify=False).plans
    plan = plans[0] if len(plans) == 1 else None  # what later plans read is not known here
    if not isinstance(plan, PlanModule):
        return []
    runs = [plan_times(x, plan.program, plan.weights) for _ in range(PROFILES)]
    least = torch.stack(runs).amin(0).tolist()
    layers = []
    for ms, step in zip(least, (step for step in plan.steps if step.op != "view"), strict=True):
        maps = [plan.maps[at] for at in (step.source, step.target) if at >= 0]
        layers.append(
            {
                "layer": step.layer.name if step.layer is not None else step.op,
                "op": step.op,
                "maps": " -> ".join(f"{m.channels}x{m.height}x{m.width}" for m in maps),
                "ms": round(ms, 4),
                "gflops": round(2 * step.macs / max(ms, 1e-6) / 1e6, 1),
            }
        )
    return sorted(layers, key=lambda layer: -layer["ms"])[:SLOWEST]


def measure(case: Case, network: nn.Module, rounds: int, threads: int, peak: float, size: int = 224) -> dict[str, Any]:
    """Rows, failures and the slowest layers of a case."""
    x = torch.randn(case.batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    settings = [setting for setting in SETTINGS if setting.provider in (OURS, *PEERS)]
    found = compare_runtimes(case.name, network, x, settings=settings, threads=threads, sample_ms=60.0)
    found.rounds(rounds)
    macs = sum(macs for macs, _, _ in layer_work(network, x[:1]))
    rows = []
    for row in found.rows():
        own = row.provider == OURS and row.ms_min is not None
        gflops = 2 * macs * case.batch / row.ms_min / 1e6 if own and row.ms_min else None
        share = None if gflops is None else round(gflops / peak, 3)
        rows.append({**row.as_dict(), "gflops": gflops and round(gflops, 1), "share_of_peak": share})
    failures = [
        {"case": case.name, "batch": case.batch, "provider": p, "setting": s, "reason": why}
        for (p, s), why in found.failures.items()
    ]
    layers = slowest_layers(network, x) if case.batch == 1 else []
    return {"rows": rows, "failures": failures, "layers": {case.name: layers} if layers else {}}


class Results:
    """The result file: written after every case, continued where it exists.

    Raises:
        ValueError: the file has rows of another machine, software or commit.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"machine": machine, "rows": [], "failures": [], "layers": {}}
        if path.exists():
            self.found = json.loads(path.read_text())
            different = [
                key
                for key in machine
                if key not in ("date", "peak_gflops") and self.found["machine"][key] != machine[key]
            ]
            if different:
                raise ValueError(f"{path}: has results of another machine or version ({', '.join(different)} differ)")

    def has(self, case: Case) -> bool:
        """Whether a case was measured."""
        return any((row["case"], row["batch"]) == (case.name, case.batch) for row in self.found["rows"])

    def add(self, more: dict[str, Any]) -> None:
        """Append a case and write the file, one row a line."""
        self.found["rows"] += more["rows"]
        self.found["failures"] += more["failures"]
        self.found["layers"].update(more["layers"])
        parts = [f' "machine": {json.dumps(self.found["machine"])}']
        for key in ("rows", "failures"):
            lines = ",\n".join("  " + json.dumps(entry) for entry in self.found[key])
            parts.append(f' "{key}": [\n{lines}\n ]' if lines else f' "{key}": []')
        layers = ",\n".join(f"  {json.dumps(name)}: {json.dumps(v)}" for name, v in self.found["layers"].items())
        parts.append(f' "layers": {{\n{layers}\n }}')
        write_atomic(self.path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def section() -> str:
    """The table of docs/performance.md."""
    parts = [_table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("shipped-*.json"))]
    return "\n\n".join(parts) or "No results yet."


def _table(found: dict[str, Any]) -> str:
    machine = found["machine"]
    names = {field for field in Row.__dataclass_fields__}
    rows = [Row(**{key: value for key, value in row.items() if key in names}) for row in found["rows"]]
    own = {(row["case"], row["batch"]): row for row in found["rows"] if row["provider"] == OURS}
    best = {(row.case, row.batch, row.provider): row for row in best_rows(rows, "ms_min")}
    lines, ratios = [], []
    for case in CASES:
        ours = own.get((case.name, case.batch))
        peers = [best.get((case.name, case.batch, peer)) for peer in PEERS]
        timed = [peer.ms_min for peer in peers if peer is not None and peer.ms_min is not None]
        if ours is None or not timed:
            continue
        ratios.append(min(timed) / ours["ms_min"])
        cells = [f"{ours['ms_min']:.2f} ({ours['ms_median']:.2f})"]
        cells += ["-" if p is None else f"{p.ms_min:.2f} ({p.ms_median:.2f})" for p in peers]
        speed = [f"{ratios[-1]:.2f}", f"{ours['gflops']:.0f}", f"{ours['share_of_peak']:.0%}"]
        lines.append([case.name, str(case.batch), *cells, *speed])
    mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan
    header = ["network", "batch", "**gatedconv**", *PEERS.values(), "fastest peer / ours", "GFLOP/s", "of the peak"]
    ahead = sum(ratio >= 1 for ratio in ratios)
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, float32, 224 x 224; torch "
        f"{machine['torch']}, onnxruntime {machine['versions'].get('onnxruntime')}, openvino "
        f"{machine['versions'].get('openvino')}; commit `{(machine['commit'] or 'unknown')[:10]}`, "
        f"{machine['date'][:10]}. Fastest call in ms (median of the rounds), each runtime at its fastest setting. "
        f"gatedconv is the fastest in {ahead} of {len(ratios)} rows; geometric mean of fastest peer / ours "
        f"{mean:.2f}. The peak is the fastest product that PyTorch computes on these threads, "
        f"{machine['peak_gflops']:.0f} GFLOP/s; Winograd's algorithms may pass it, because the multiply-adds of the "
        f"direct sum are counted.\n\n" + markdown_table(header, lines, 1) + _not_measured(found["failures"])
    )


def _not_measured(failures: list[dict[str, Any]]) -> str:
    lines = [f"- {f['case']}, batch {f['batch']}, {f['provider']} {f['setting']}: {f['reason']}" for f in failures]
    return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shipped", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each case [9]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every runtime [2]")
    parser.add_argument("--minutes", type=float, help="start no case after this time; run again to continue")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images [224]")
    parser.add_argument("--out", type=Path, help="result file [benchmarks/results/shipped-DEVICE.json]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    peak = measured_rates(torch.device("cpu"), torch.float32).flop_per_ms / 1e6
    machine = {**machine_header(options.threads), "size": options.size, "peak_gflops": round(peak, 1)}
    results = Results(options.out or RESULTS / f"shipped-{machine['device']}.json", machine)
    for (name, cut), cases in itertools.groupby(CASES, key=lambda case: (case.network, case.cut)):
        left = [case for case in cases if options.only in case.name and not results.has(case)]
        if not left or time.monotonic() > end:
            continue
        network = build(name, cut, options.size)
        for case in left:
            results.add(
                measure(
                    case,
                    network,
                    options.rounds,
                    options.threads,
                    results.found["machine"]["peak_gflops"],
                    options.size,
                )
            )
            say(
                f"{case.name}, batch {case.batch}: "
                + ", ".join(
                    f"{row['provider']} {row['setting']} {row['ms_min']:.2f} ms"
                    for row in results.found["rows"]
                    if (row["case"], row["batch"]) == (case.name, case.batch)
                )
            )


if __name__ == "__main__":
    main()
