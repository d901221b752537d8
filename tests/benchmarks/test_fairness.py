from __future__ import annotations

import time

import torch

from benchmarks.fairness import compare, same_order
from gatedconv.report.bench import Contest


def test_times_in_turns_and_alone() -> None:
    def waits(ms: float):
        def run() -> torch.Tensor:
            time.sleep(ms / 1000)
            return torch.zeros(1)

        return lambda: run

    prepare = {("slow", "a"): waits(4), ("fast", "a"): waits(9), ("fast", "b"): waits(1)}
    contest = Contest("network", "sleep", 1, prepare, dict.fromkeys(prepare, torch.zeros(1)), turn_ms=1)
    found = compare(contest, 2)
    assert [entrant for entrant, _, _ in found] == [("fast", "b"), ("slow", "a")]
    assert all(1 <= ms < 9 for _, turns, alone in found for ms in (turns, alone))


def test_the_order_is_judged_with_some_tolerance() -> None:
    def judged(*alone: float) -> bool:
        return same_order([(("p", str(i)), float(i), ms) for i, ms in enumerate(alone)])

    assert judged(1, 2, 3) and judged(1, 0.97, 3)
    assert not judged(1, 0.9, 3) and not judged(1, 3, 0.5)
