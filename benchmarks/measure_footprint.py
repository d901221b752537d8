"""Footprints of networks in each runtime, for docs/performance.md: ``python -m benchmarks.measure_footprint``.

Install gatedconv-runtime (``pip install ./runtime``), onnxruntime, MNN, ncnn and pnnx first. Every figure is the least
of interleaved processes, on one thread: see gatedconv/bench/footprint.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gatedconv
from benchmarks.harness import RESULTS, machine_header, write_result
from gatedconv.bench.footprint import measure_footprints
from gatedconv.environment import versions
from gatedconv.report.footprint_table import footprint_rows
from gatedconv.report.tables import text_table

NETWORKS = {"ResNet-20, CIFAR": "resnet20", "ResNet-56, CIFAR": "resnet56"}


def build(name: str) -> nn.Module:
    """A network of `gatedconv.models` with random weights."""
    torch.manual_seed(0)
    model: nn.Module = getattr(gatedconv.models, name)().eval()
    return model


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    x = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for title, name in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure_footprints(build(name), x, Path(folder), rounds=arguments.rounds)
        rows += [{"network": title, **dataclasses.asdict(row)} for row in found]
        print(f"{title}\n{text_table(*footprint_rows(rows[-len(found) :]))}\n")
    result = {"rounds": arguments.rounds, "machine": machine_header(1), "versions": versions(), "rows": rows}
    write_result(RESULTS / "footprint.json", result)


if __name__ == "__main__":
    main()
