"""Every algorithm for the 3x3 convolutions of shipped networks, timed, and whether the plan's choice is the best.

``python -m benchmarks.kernels [CASE ...]`` interleaves the algorithms of each case and exits with 1 if one that the
plan would choose is more than 5 % slower than the best. A case is written "n8 i256 o128 h14": images, input and output
channels, height and width. What is timed is the processor's time of one thread, to which other programs add little, for
a call of a plan of the layer alone, which also turns its map from NCHW to NHWC and back. ``--save`` keeps the times in
a result file, ``--fit`` prints the rates of gatedconv/engine/choose.py that suit the result files best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import RESULTS, machine_header, made_by, write_result
from gatedconv.bench.conv_case import ConvCase
from gatedconv.engine.choose import ALGORITHMS, RATES, Rates, Work
from gatedconv.engine.fuse import fuse
from gatedconv.engine.layers import Layer
from gatedconv.engine.lower import lower
from gatedconv.engine.partition import find_segments
from gatedconv.engine.time_on_cpu import layer_call, least_ms
from gatedconv.ops.plan import plan_isa, unavailable
from gatedconv.report.tables import markdown_table

# The rates are those of Xeons. Fitted along with the times of an EPYC, they are worse on both: the worst choice takes
# 1.6 to 2.4 times as long as the best in place of 1.02 to 1.14 times.
FITTED = "kernels-xeon-*.json"
# Of ResNet-18 and 50, dense and half compact; EfficientNetV2-S, DenseNet-121, YOLOv8n; CIFAR ResNets; odd counts.
SHAPES = (
    "i64 o64 h56",
    "i64 o32 h56",
    "i32 o64 h56",
    "i128 o128 h28",
    "i128 o64 h28",
    "i64 o128 h28",
    "i256 o256 h14",
    "i256 o128 h14",
    "i128 o256 h14",
    "i512 o512 h7",
    "i512 o256 h7",
    "i256 o512 h7",
    "i24 o24 h112",
    "i48 o192 h56",
    "i64 o256 h28",
    "i128 o32 h56",
    "i128 o32 h28",
    "i128 o32 h14",
    "i128 o32 h7",
    "i16 o16 h56",
    "i32 o32 h28",
    "i64 o64 h14",
    "i128 o128 h7",
    "i16 o16 h32",
    "i32 o32 h16",
    "i64 o64 h8",
    "i27 o61 h28",
    "i189 o75 h14",
)
CASES = tuple(f"n{batch} {shape}" for shape in SHAPES for batch in (1, 8))
LIMIT = 1.05  # of the chosen algorithm's time over the best one's
ROUNDS = 3
WORST = 6  # cases in docs/performance.md


def parse(case: str) -> Work:
    """Read a case; ValueError, saying what is wrong, where it is none."""
    found = ConvCase.parse(f"{case} k3")
    return Work(found.batch, found.in_channels, found.out_channels, *found.size)


def layer_of(work: Work) -> Layer:
    """The convolution as a layer of a plan, with random weights."""
    conv = nn.Conv2d(work.in_channels, work.out_channels, 3, 1, 1)
    traced = lower(nn.Sequential(conv), torch.zeros(1, work.in_channels, work.height, work.width))
    (segment,) = find_segments(traced)
    (layer,) = fuse(segment.layers, segment.result)
    return layer


def time_algorithms(work: Work, rounds: int = ROUNDS) -> dict[str, float]:
    """Each algorithm's least milliseconds, interleaved."""
    layer = layer_of(work)
    calls = {name: layer_call(layer, work.batch, name, threads=1) for name in ALGORITHMS}
    times = [{name: least_ms(call, time.process_time) for name, call in calls.items()} for _ in range(rounds)]
    return {name: min(one[name] for one in times) for name in ALGORITHMS}


def chosen(work: Work) -> str:
    """The algorithm that a plan would take."""
    return min(ALGORITHMS, key=lambda algorithm: work.estimate(algorithm, RATES))


def fit(rows: Iterable[dict[str, Any]]) -> Rates:
    """The rates, none negative, with the least sum of squares of relative errors, in multiply-adds of direct ones."""
    amounts, times = [], []
    for row in rows:
        work = parse(row["case"])
        for algorithm, ms in row["ms"].items():
            turned = work.height * work.width * (work.in_channels + work.out_channels)
            amounts.append([work.batch * amount / ms for amount in (*work.amounts(algorithm), turned)])
            times.append(1.0)
    a, b = np.array(amounts), np.array(times)
    used = list(range(a.shape[1]))
    while True:
        found = np.linalg.lstsq(a[:, used], b, rcond=None)[0]
        if found.min() >= 0:
            break
        del used[int(found.argmin())]
    rates = np.zeros(a.shape[1])
    rates[used] = found
    # The turning of the map is the same for all algorithms.
    return Rates(*(round(float(rate / rates[0]), 2) for rate in rates[:-1]))


def check(cases: Sequence[str]) -> list[dict[str, Any]]:
    """Time and judge the cases."""
    return [judge(case, time_algorithms(parse(case))) for case in cases]


def judge(case: str, times: dict[str, float]) -> dict[str, Any]:
    """A row: case, milliseconds of each algorithm, the chosen one and its time over the best one's."""
    name = chosen(parse(case))
    return {"case": case, "ms": times, "chosen": name, "over_best": times[name] / min(times.values())}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, with the GFLOP/s of the direct sum."""
    lines = []
    for row in rows:
        work, best = parse(row["case"]), min(row["ms"].values())
        flop = 18 * work.batch * work.in_channels * work.out_channels * work.height * work.width
        cells = [f"{ms:.3f}" for ms in row["ms"].values()]
        lines.append([row["case"], *cells, row["chosen"], f"{row['over_best']:.2f}", f"{flop / best / 1e6:.0f}"])
    return markdown_table(
        ["case", *(f"{name} ms" for name in ALGORITHMS), "chosen", "over best", "GFLOP/s of the best"], lines, 1
    )


def section() -> str:
    """The part of docs/performance.md: how near the choices are to the best of the saved times, and the worst ones."""
    parts = []
    for path in sorted(RESULTS.glob("kernels-*.json")):
        found = json.loads(path.read_text())
        machine = found["machine"]
        rows = [judge(row["case"], row["ms"]) for row in found["rows"]]
        near = sum(row["over_best"] <= LIMIT for row in rows)
        worst = sorted(rows, key=lambda row: -row["over_best"])[:WORST]
        mean = statistics.geometric_mean(row["over_best"] for row in rows)
        parts.append(
            f"{machine['cpu']}, {found['isa']}, one thread; {made_by(machine)}. The choice takes at most "
            f"5 % longer than the best algorithm in {near} of {len(rows)} cases ({near / len(rows):.0%}), and "
            f"{mean - 1:.1%} longer in the geometric mean. The {len(worst)} worst:\n\n{table(worst)}"
        )
    return "\n\n".join(parts) or "Not measured yet."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases [those of shipped networks]")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kernels-DEVICE.json")
    parser.add_argument("--fit", action="store_true", help="time nothing; fit the rates to the result files")
    options = parser.parse_args(arguments)
    if options.fit:
        files = sorted(RESULTS.glob(FITTED))
        print(fit(row for path in files for row in json.loads(path.read_text())["rows"]))
        return 0
    if (reason := unavailable()) is not None:
        raise SystemExit(reason)
    torch.set_num_threads(1)
    rows = check(options.cases or CASES)
    print(table(rows))
    if options.save:
        machine = machine_header(1)
        times = [{"case": row["case"], "ms": {name: round(ms, 4) for name, ms in row["ms"].items()}} for row in rows]
        found = {"machine": machine, "isa": plan_isa(), "rows": times}
        write_result(RESULTS / f"kernels-{machine['device']}.json", found)
    return int(any(row["over_best"] > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
