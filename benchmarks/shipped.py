"""The networks that people ship, dense and half pruned, in our engine and in other runtimes.

``python -m benchmarks.shipped`` measures what its result file lacks; ``--minutes`` bounds it, and a second call
continues. The other groups have files of their own, and our engine is measured again in each: ``--group small`` has
our CIFAR ResNets, ``--group mobile`` runtimes made for phones, ``--group reduced`` those that compute in fewer bits.
Runtimes are interleaved, as in ``pytest benchmarks``; every row has the median and the fastest call. Rows of ours also
have the GFLOP/s of the fastest call, and their share of the fastest product that PyTorch computes on the same threads;
at batch 1 they list the ten slowest layers, each timed on all threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatedconv
from benchmarks.harness import RESULTS, ResultFile, machine_header, made_by
from benchmarks.networks import NetworkCase, fill_norms, half_inside
from benchmarks.roofline import layer_work, measured_rates
from benchmarks.yolo import Yolo
from gatedconv.bench.comparison import PROBES, Row, best_rows, compare_runtimes
from gatedconv.bench.quantizers import CALIBRATION
from gatedconv.bench.runtimes import OURS, REDUCED, SETTINGS
from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.environment import versions
from gatedconv.ops.plan import plan_times
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
VARIANTS, BATCHES = ("dense", "mid-50"), (1, 8)
PEERS = {
    OURS: "gatedconv",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "mnn": "MNN",
    "ncnn": "ncnn",
    "litert": "LiteRT",
}
OWN = tuple(setting for setting in SETTINGS if setting.provider == OURS)
_SERVERS = tuple(s for s in SETTINGS if s.provider in (OURS, "onnxruntime", "openvino"))
GROUPS = {
    "main": _SERVERS,
    "small": _SERVERS,
    "mobile": OWN + tuple(s for s in SETTINGS if s.provider in ("mnn", "ncnn", "litert")),
    "reduced": OWN + REDUCED,
}
"""Settings that are measured interleaved; each group has a result file of its own."""
PACKAGES = {"main": (), "small": (), "mobile": ("MNN", "ncnn", "pnnx", "ai-edge-litert"), "reduced": ("nncf",)}
SLOWEST, PROFILES = 10, 20


@dataclass(frozen=True)
class ShippedCase:
    """A network, "dense" or "mid-50" (half of the channels inside of its blocks removed at random), and a batch."""

    network: str
    variant: str
    batch: int

    @property
    def name(self) -> str:
        """The name in result rows."""
        return f"{self.network} {self.variant}"


CASES = tuple(ShippedCase(*case) for case in itertools.product(NETWORKS, VARIANTS, BATCHES))
SMALL = tuple(ShippedCase(*case) for case in itertools.product(("resnet56", "resnet110"), VARIANTS, (1, 32)))


def build(network: str, variant: str, size: int = 224) -> nn.Module:
    """A network in eval mode with random weights, for images (N, 3, size, size).

    Raises:
        ImportError: torchvision is not installed.
    """
    if hasattr(gatedconv.models, network):
        return NetworkCase(network, variant, 1).build()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if network == "yolov8n":
            model: nn.Module = Yolo()
        else:
            import torchvision

            model = getattr(torchvision.models, network)(weights=None)
        fill_norms(model)
        model.eval()
        return model if variant == "dense" else half_inside(model, torch.randn(1, 3, size, size))


def slowest_layers(network: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """The layers that take most of a call (1, 3, H, W): name, operation, sizes, the median ms of calls, GFLOP/s."""
    plans = gatedconv.Engine(network, x, verify=False).plans
    plan = plans[0] if len(plans) == 1 else None  # what later plans read is not known here
    if not isinstance(plan, PlanModule):
        return []
    runs = [plan_times(x, plan.program, plan.weights) for _ in range(PROFILES)]
    times = torch.stack(runs).median(0).values.tolist()  # a step that another worker finished reads near 0
    layers = []
    for ms, step in zip(times, (step for step in plan.steps if step.op != "view"), strict=True):
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


def measure(
    case: ShippedCase, network: nn.Module, folder: Path, options: argparse.Namespace, peak: float
) -> dict[str, Any]:
    """Rows, failures and, in the main group, the slowest layers of a case; files go to the folder."""
    x = torch.randn(case.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))
    found = compare_runtimes(
        case.name, network, x, settings=GROUPS[options.group], folder=folder, threads=options.threads, sample_ms=60.0
    )
    found.rounds(options.rounds)
    macs = sum(macs for macs, _, _ in layer_work(network, x[:1]))
    rows = []
    for row in found.rows():
        own = row.provider == OURS and row.ms_min is not None
        gflops = 2 * macs * case.batch / row.ms_min / 1e6 if own and row.ms_min else None
        share = None if gflops is None else round(gflops / peak, 3)
        rows.append({**row.as_dict(), "gflops": gflops and round(gflops, 1), "share_of_peak": share})
    layers = slowest_layers(network, x) if case.batch == 1 and GROUPS[options.group] is _SERVERS else []
    return {"rows": rows, "failures": found.failure_rows(), "layers": {case.name: layers} if layers else {}}


def section() -> str:
    """The tables of docs/performance.md, by machine: all peers in float32, and those in fewer bits."""
    machines: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("shipped-*.json")):
        found = json.loads(path.read_text())
        machines.setdefault(found["machine"]["device"], {})[found["machine"].get("group", "main")] = found
    parts = []
    for groups in machines.values():
        if "main" in groups:
            parts += [_table(groups), _reduced(groups)]
        if "small" in groups:
            parts.append(_table({"main": groups["small"]}, "Small images, same precision."))
    return "\n\n".join(parts) or "No results yet."


def headline() -> str:
    """The table of README.md: how often and how far the engine is ahead, and what fewer bits gain elsewhere."""
    names = sorted(path.stem for path in RESULTS.glob("shipped-*.json"))
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}
    lines, networks, size = [], 0, 0
    for name, main in found.items():
        machine = main["machine"]
        if machine.get("group", "main") != "main":
            continue
        least = _least(main)
        networks, size = max(networks, len({case.network for case in least})), machine["size"]
        few = _least(found[f"{name}-reduced"]) if f"{name}-reduced" in found else {}
        lines.append([_cpu(machine), _wins([*least.values()]), *_means(least), *_means(few, networks)])
    if not lines:
        return "Not measured yet."
    header = ["CPU", "rows won", "dense", "half pruned", "dense, any precision", "half pruned, any precision"]
    return (
        f"Speedup of our float32 engine over the faster of ONNX Runtime and OpenVINO in float32: geometric means over "
        f"{networks} networks\n({size} pixels, batch 1 and 8), dense and with half of the channels inside each block "
        f"removed. The last two columns compare the\nsame engine with the fastest bfloat16 or int8 runtime; below 1, "
        f"that runtime is faster.\n[All rows](docs/performance.md), with those that we lose.\n\n"
        + markdown_table(header, lines, 1)
    )


def _least(found: dict[str, Any]) -> dict[ShippedCase, float]:
    """For each case of a result file the fastest peer's time over ours."""
    timed = _Timed(found)
    return {case: min(ratios) for case in CASES if (ratios := timed.ratios(case))}


def _means(least: dict[ShippedCase, float], networks: int = 0) -> list[str]:
    """The geometric mean of each variant; fewer networks than ``networks`` are counted in the cell."""
    cells = []
    for variant in VARIANTS:
        ratios = {case: ratio for case, ratio in least.items() if case.variant == variant}
        count = len({case.network for case in ratios})
        few = f" ({count} network{'s' * (count > 1)})" if count < networks else ""
        cells.append(f"{_geometric_mean([*ratios.values()]):.2f}{few}" if ratios else "-")
    return cells


def _cpu(machine: dict[str, Any]) -> str:
    """Such as "Intel Xeon, AVX-512, 2 threads"."""
    name = re.sub(r"\((R|TM|family/model [^)]*)\)|\bProcessor\b", "", machine["cpu"])
    isa = machine["isa"].replace("AVX512", "AVX-512")
    return f"{' '.join(name.split())}, {isa}, {machine['threads']} threads"


class _Timed:
    """A group's rows: for each case and batch, ours and the fastest setting of each peer and dtype."""

    def __init__(self, found: dict[str, Any]) -> None:
        names = set(Row.__dataclass_fields__)
        rows = [Row(**{key: value for key, value in row.items() if key in names}) for row in found["rows"]]
        self.best: dict[ShippedCase, dict[tuple[str, str], Row]] = {case: {} for case in CASES + SMALL}
        for row in best_rows(rows, "ms_min"):
            case = next(case for case in self.best if (case.name, case.batch) == (row.case, row.batch))
            self.best[case][row.provider, row.dtype] = row

    def ours(self, case: ShippedCase) -> Row | None:
        return self.best[case].get((OURS, "float32"))

    def peers(self, case: ShippedCase) -> dict[tuple[str, str], Row]:
        return {key: row for key, row in self.best[case].items() if key[0] != OURS}

    def ratios(self, case: ShippedCase, dtype: str = "float32") -> list[float]:
        """Peer over ours in a dtype, of interleaved calls."""
        ours = self.best[case].get((OURS, dtype))
        times = [row.ms_min for row in self.peers(case).values() if row.ms_min]
        return [ms / ours.ms_min for ms in times] if ours is not None and ours.ms_min else []


def _table(groups: dict[str, dict[str, Any]], title: str = "Same precision.") -> str:
    found = groups["main"]
    machine = found["machine"]
    timed = [_Timed(groups[name]) for name in ("main", "mobile") if name in groups]
    cases = CASES + SMALL
    shown = {p: name for p, name in PEERS.items() if any((p, "float32") in t.peers(c) for t in timed for c in cases)}
    own = {(row["case"], row["batch"]): row for row in found["rows"] if row["provider"] == OURS}
    lines, ratios = [], []
    for case in cases:
        ours, peers = own.get((case.name, case.batch)), {k: v for t in timed for k, v in t.peers(case).items()}
        faster = [ratio for t in timed for ratio in t.ratios(case)]
        if ours is None or not faster:
            continue
        ratios.append(min(faster))
        cells = [f"{ours['ms_min']:.2f} ({ours['ms_median']:.2f})", *(_ms(peers.get((p, "float32"))) for p in shown)]
        speed = [f"{ratios[-1]:.2f}", f"{ours['gflops']:.0f}", f"{ours['share_of_peak']:.0%}"]
        lines.append([case.name, str(case.batch), *cells, *speed])
    header = ["network", "batch", "**gatedconv**", *shown.values(), "fastest peer / ours", "GFLOP/s", "of the peak"]
    facts = [
        f"gatedconv is the fastest in {_wins(ratios)} rows; geometric mean of fastest peer / ours "
        f"{_geometric_mean(ratios):.2f}.",
        f"Peak: {machine['peak_gflops']:.0f} GFLOP/s.",
        *_software({name: groups[name] for name in ("main", "mobile") if name in groups}),
    ]
    if machine.get("group", "main") == "main" and "mobile" not in groups:
        facts.append("MNN, ncnn and LiteRT are not measured yet.")
    return (
        f"**{title}** {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, float32, "
        f"{machine['size']} x {machine['size']}:\n\n{_list(facts)}\n\n"
        + markdown_table(header, lines, 1)
        + _not_measured(f for name in ("main", "mobile") if name in groups for f in groups[name]["failures"])
    )


def _reduced(groups: dict[str, dict[str, Any]]) -> str:
    if "reduced" not in groups:
        return "**Any precision.** Not measured yet."
    found = groups["reduced"]
    timed, exact = _Timed(found), [_Timed(groups[name]) for name in ("main", "mobile") if name in groups]
    keys = [(s.provider, s.dtype) for s in REDUCED]
    lines, ratios = [], []
    for case in CASES:
        ours = timed.ours(case)
        faster = [ratio for t in (timed, *exact) for ratio in t.ratios(case)]
        if ours is None or not faster:
            continue
        ratios.append(min(faster))
        shown = [timed.best[case].get(key) for key in keys]
        cells = [_ms(ours), *(cell for row in shown for cell in (_ms(row), _quality(row)))]
        half = min(timed.ratios(case, "bfloat16"), default=None)
        lines.append([case.name, str(case.batch), *cells, f"{ratios[-1]:.2f}", "-" if half is None else f"{half:.2f}"])
    titles = [title for p, dtype in keys for title in (f"{PEERS[p]} {dtype}", "error, same top-1")]
    header = [
        "network",
        "batch",
        "**gatedconv** float32",
        *titles,
        "fastest peer / ours",
        "fastest reduced peer / ours in bfloat16",
    ]
    machine = found["machine"]
    facts = [
        f"Against all peers of any precision, gatedconv in float32 is the fastest in {_wins(ratios)} rows, geometric "
        f'mean {_geometric_mean(ratios):.2f} (column "fastest peer / ours").',
        f"int8 is calibrated on {CALIBRATION} images: NNCF for OpenVINO, static QDQ for ONNX Runtime.",
        f"Error: max|a - b| / max|b| of the outputs of {PROBES} other images; same top-1: the share of them with the "
        "same largest output.",
        f"{made_by(machine).capitalize()}.",
    ]
    return (
        f"**Any precision.** {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, the same "
        f"networks:\n\n{_list(facts)}\n\n" + markdown_table(header, lines, 1) + _not_measured(found["failures"])
    )


def _wins(ratios: list[float]) -> str:
    return f"{sum(ratio >= 1 for ratio in ratios)} of {len(ratios)}"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _software(groups: dict[str, dict[str, Any]]) -> list[str]:
    """Two sentences: versions, and the commit of each group."""
    machines = {name: found["machine"] for name, found in groups.items()}
    known = {name: number for machine in machines.values() for name, number in machine["versions"].items()}
    packages = ("torch", "onnxruntime", "openvino", *(package for group in PACKAGES.values() for package in group))
    commits = ", ".join(
        f"`{(machine['commit'] or 'unknown')[:10]}` ({name}, {machine['date'][:10]})"
        for name, machine in machines.items()
    )
    used = ", ".join(f"{name} {known[name]}" for name in packages if name in known)
    return [f"Versions: {used}.", f"Commits: {commits}."] if used else [f"Commits: {commits}."]


def _ms(row: Row | None) -> str:
    return "-" if row is None else f"{row.ms_min:.2f} ({row.ms_median:.2f})"


def _quality(row: Row | None) -> str:
    return "-" if row is None or row.agreement is None else f"{row.error:.1e}, {row.agreement:.0%}"


def _geometric_mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan


def _not_measured(failures: Iterable[dict[str, Any]]) -> str:
    cases: dict[tuple[str, str, str], list[str]] = {}
    for f in failures:
        cases.setdefault((f["provider"], f["setting"], f["reason"]), []).append(f"{f['case']}, batch {f['batch']}")
    lines = [
        f"{provider}, {setting}: {reason} ({'; '.join(names) if len(names) < 4 else f'{len(names)} cases'})"
        for (provider, setting, reason), names in cases.items()
    ]
    return f"\n\nNot measured:\n\n{_list(lines)}" if lines else ""


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shipped", description=__doc__)
    parser.add_argument("--group", choices=GROUPS, default="main", help="peers to measure along with our engine [main]")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each case [9]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every runtime [2]")
    parser.add_argument("--minutes", type=float, help="start no case after this time; run again to continue")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--size", type=int, help="height and width of the images [224; 32 in the group small]")
    parser.add_argument("--out", type=Path, help="result file [benchmarks/results/shipped-DEVICE.json, -GROUP]")
    options = parser.parse_args(arguments)
    options.size = options.size or (32 if options.group == "small" else 224)
    torch.set_num_threads(options.threads)
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    peak = measured_rates(torch.device("cpu"), torch.float32).flop_per_ms / 1e6
    machine = {**machine_header(options.threads), "size": options.size, "peak_gflops": round(peak, 1)}
    end_of_name = ""
    if options.group != "main":
        machine |= {"group": options.group, "versions": machine["versions"] | versions(*PACKAGES[options.group])}
        end_of_name = f"-{options.group}"
    record = ResultFile(options.out or RESULTS / f"shipped-{machine['device']}{end_of_name}.json", machine)
    wanted = SMALL if options.group == "small" else CASES
    for (name, variant), cases in itertools.groupby(wanted, key=lambda case: (case.network, case.variant)):
        left = [case for case in cases if options.only in case.name and not record.has(case.name, case.batch)]
        if not left or time.monotonic() > end:
            continue
        network = build(name, variant, options.size)
        with tempfile.TemporaryDirectory() as folder:  # of both batches: conversion takes longer than measuring
            for case in left:
                found = measure(case, network, Path(folder), options, record.found["machine"]["peak_gflops"])
                record.add(**found)
                times = ", ".join(f"{row['provider']} {row['setting']} {row['ms_min']:.2f} ms" for row in found["rows"])
                say(f"{case.name}, batch {case.batch}: {times}")


if __name__ == "__main__":
    main()
