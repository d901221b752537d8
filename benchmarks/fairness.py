"""Checks that taking turns does nobody wrong: each provider alone against the same provider in turns with the others.

``python -m benchmarks.fairness [MODEL CUT BATCH]`` prints both times of every provider's fastest setting; their order
should be the same. Runs for about a minute.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.conftest import CACHE
from benchmarks.networks import CUTS, NetworkCase
from gatedconv.measure.turns import Turns
from gatedconv.report.bench import Contest, Entrant, best_rows, network_contest
from gatedconv.report.tables import text_table

TURN_MS = 40.0


def compare(contest: Contest, rounds: int) -> list[tuple[Entrant, float, float]]:
    """(entrant, ms in turns, ms alone) of each provider's fastest setting, fastest in turns first."""
    contest.rounds(rounds)
    rows = sorted(best_rows(contest.rows()), key=lambda row: row.ms_median)
    found = []
    for row in rows:
        entrant = (row.provider, row.setting)
        with torch.inference_mode():
            alone = Turns({entrant: contest.turns.entrants[entrant]}, turn_ms=TURN_MS)
            for _ in range(rounds):
                alone.round()
        found.append((entrant, row.ms_median, alone.spread(entrant).median))
    return found


def same_order(found: list[tuple[Entrant, float, float]], tolerance: float = 0.05) -> bool:
    """Whether nobody who is slower in turns is faster alone, by more than `tolerance`."""
    alone = [ms for _, _, ms in found]
    return all(slower >= (1 - tolerance) * faster for i, faster in enumerate(alone) for slower in alone[i + 1 :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet56")
    parser.add_argument("cut", nargs="?", default="mid-50", choices=CUTS)
    parser.add_argument("batch", nargs="?", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = NetworkCase(arguments.model, arguments.cut, arguments.batch)
    network, x = case.build()
    contest = network_contest(case.name, network, x, folder=CACHE, threads=arguments.threads, turn_ms=TURN_MS)
    found = compare(contest, arguments.rounds)
    lines = [[*entrant, f"{turns:.3f}", f"{alone:.3f}", f"{alone / turns:.2f}"] for entrant, turns, alone in found]
    print(text_table(["provider", "setting", "in turns (ms)", "alone (ms)", "alone / in turns"], lines))
    print("The order is the same." if same_order(found) else "The order is not the same.")
    return int(not same_order(found))


if __name__ == "__main__":
    sys.exit(main())
