"""What a network weighs in each runtime, for docs/performance.md: ``python -m benchmarks.footprint``.

Install gatedconv-runtime (``pip install ./runtime``), onnxruntime, MNN, ncnn and pnnx first. Every figure is the least
of interleaved processes, on one thread: see gatedconv/report/footprint.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gatedconv
from gatedconv.environment import commit, versions
from gatedconv.measure.interleaved import Interleaved
from gatedconv.report.footprint import footprint_rows, measure_footprints
from gatedconv.report.tables import text_table

RESULTS = Path(__file__).parent / "results" / "footprint.json"
NETWORKS = {"ResNet-20, CIFAR": "resnet20", "ResNet-56, CIFAR": "resnet56"}


def build(name: str) -> nn.Module:
    """A network of `gatedconv.models` with random weights."""
    torch.manual_seed(0)
    model: nn.Module = getattr(gatedconv.models, name)().eval()
    return model


def speed(title: str, network: nn.Module, batch: int, rounds: int) -> dict[str, Any]:
    """Interleaved call times of the runtime and of the engine in one process, on one thread; whether bits are equal."""
    import gatedconv_runtime as rt

    x = torch.randn((batch, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.plan"
        gatedconv.export(network, path, x, format="plan")
        plan, engine = rt.load(path, threads=1), gatedconv.Engine(network, x, threads=1)
    with torch.inference_mode():
        equal = bool((engine(x).numpy() == plan(x.numpy())).all())
        timing = Interleaved({"runtime": lambda: plan(x.numpy()), "engine": lambda: engine(x)})
        for _ in range(rounds):
            timing.round()
    least = timing.least["runtime"], timing.least["engine"]
    ratio = timing.ratio("runtime", "engine")
    return {
        "network": title,
        "batch": batch,
        "runtime_ms": round(least[0], 4),
        "engine_ms": round(least[1], 4),
        "least_ratio": round(least[0] / least[1], 4),
        "ratio": round(ratio.median, 4),
        "equal": equal,
    }


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    x = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    rows, speeds = [], []
    for title, name in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure_footprints(build(name), x, Path(folder), rounds=arguments.rounds)
        rows += [{"network": title, **dataclasses.asdict(row)} for row in found]
        print(f"{title}\n{text_table(*footprint_rows(rows[-len(found) :]))}\n")
        speeds += [speed(title, build(name), batch, 5 * arguments.rounds) for batch in (1, 32)]
        for row in speeds[-2:]:
            print(row)
    result = {"rounds": arguments.rounds, "commit": commit(), "versions": versions(), "rows": rows, "speed": speeds}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
