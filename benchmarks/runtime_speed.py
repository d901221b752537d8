"""The speed of gatedconv-runtime compared with the engine's: ``python -m benchmarks.runtime_speed``.

Both run the same plan in one process, interleaved, and their outputs are compared bit by bit. Install gatedconv-runtime
(``pip install ./runtime``) first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatedconv
from benchmarks import shipped
from benchmarks.harness import RESULTS, machine_header, made_by, write_result
from benchmarks.networks import NetworkCase, fill_norms
from gatedconv.measure.latency import Interleaved
from gatedconv.report.tables import markdown_table
from gatedconv.train.presets import preset_settings

FILE = RESULTS / "runtime.json"
CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
IMAGENET = ("mobilenet_v2", "efficientnet_b0", "resnet50")
WANTED = 1.03
"""The runtime's time over the engine's, at most."""


@dataclass(frozen=True)
class RuntimeCase:
    """A compact network and a batch: "demo" (half of the blocks left), others with half of the channels in blocks."""

    network: str
    batch: int

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network in eval mode and its input (N, C, H, W)."""
        if self.network == "demo":
            network, size = _demo(), (1, 8, 8)
        elif self.network in CIFAR:
            network, size = NetworkCase(self.network, "mid-50", self.batch).build()[0], (3, 32, 32)
        else:
            network, size = shipped.build(self.network, "mid-50"), (3, 224, 224)
        return network, torch.randn(self.batch, *size, generator=torch.Generator().manual_seed(0))


CASES = tuple(
    RuntimeCase(*case) for case in (*itertools.product(("demo", *CIFAR), (1, 32)), *itertools.product(IMAGENET, (1, 8)))
)


def _demo() -> nn.Module:
    """The network of the preset `demo` with every second gate closed."""
    preset, size = preset_settings("demo"), (1, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = getattr(gatedconv.models, preset["model"])
        network: nn.Module = make(10, preset["gate"], position=preset["position"], input_size=size)
        fill_norms(network)
    masks = {name: torch.tensor([i % 2 == 0]) for i, name in enumerate(gatedconv.gates(network))}
    return gatedconv.compact(gatedconv.freeze(network.eval(), masks=masks), torch.zeros(1, *size))


def measure(case: RuntimeCase, threads: int, rounds: int) -> dict[str, Any]:
    """Fastest calls of the runtime and of the engine in ms, their ratio, and whether all bits are equal."""
    import gatedconv_runtime as rt

    network, x = case.build()
    engine = gatedconv.Engine(network, x, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.plan"
        gatedconv.export(engine, path, x, format="plan")
        plan = rt.load(path, threads=threads)
    array = x.numpy()
    with torch.inference_mode():
        equal = engine(x).numpy().tobytes() == plan(array).tobytes()
        timing = Interleaved({"runtime": lambda: plan(array), "engine": lambda: engine(x)})
        for i in range(rounds):
            timing.round(("engine", "runtime") if i % 2 else ("runtime", "engine"))
    return {
        "network": case.network,
        "batch": case.batch,
        "threads": threads,
        "runtime_ms": round(timing.least["runtime"], 4),
        "engine_ms": round(timing.least["engine"], 4),
        "least_ratio": round(timing.least["runtime"] / timing.least["engine"], 4),
        "ratio": round(timing.ratio("runtime", "engine").median, 4),
        "equal": equal,
    }


def section() -> str:
    """The table of docs/performance.md."""
    if not FILE.is_file():
        return "Not measured yet."
    found = json.loads(FILE.read_text())
    machine, rows = found["machine"], found["rows"]
    lines = [
        [
            *(str(row[key]) for key in ("network", "batch", "threads")),
            *(f"{row[key]:.3f}" for key in ("runtime_ms", "engine_ms", "least_ratio", "ratio")),
            "yes" if row["equal"] else "no",
        ]
        for row in rows
    ]
    header = [
        "network",
        "batch",
        "threads",
        "runtime (ms)",
        "engine (ms)",
        "runtime / engine",
        "of rounds",
        "same bits",
    ]
    kept = sum(row["least_ratio"] <= WANTED for row in rows)
    mean = statistics.geometric_mean(row["least_ratio"] for row in rows)
    return (
        f"{machine['cpu']}, {machine['isa']}; torch {machine['torch']}; {made_by(machine)}; "
        f"{found['rounds']} rounds. Fastest calls, their ratio, and the median ratio of the "
        f"rounds. In {kept} of {len(rows)} rows the runtime takes at most {WANTED - 1:.0%} longer than the engine; "
        f"geometric mean of the ratios {mean:.3f}.\n\n" + markdown_table(header, lines, 1)
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime_speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="of each row [25]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of both [1 2]")
    parser.add_argument("--only", default="", metavar="TEXT", help="networks whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=FILE, help="result file [benchmarks/results/runtime.json]")
    options = parser.parse_args(arguments)
    rows = []
    for case, threads in itertools.product((case for case in CASES if options.only in case.network), options.threads):
        rows.append(measure(case, threads, options.rounds))
        print(rows[-1], flush=True)
    result = {"machine": machine_header(max(options.threads)), "rounds": options.rounds, "rows": rows}
    write_result(options.out, result)


if __name__ == "__main__":
    main()
