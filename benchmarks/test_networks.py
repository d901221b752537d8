"""Whole networks, dense and cut, in our engine and in every CPU runtime that a user could pick."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.conftest import CACHE, as_parameters
from benchmarks.networks import CASES, NetworkCase
from gatedconv.report.bench import Contest, network_contest

TURN_MS = {32: 25.0, 224: 60.0}


@pytest.mark.timeout(540)
@pytest.mark.parametrize("case", as_parameters(CASES))
def test_network(case: NetworkCase, compete: Callable[..., None], cpu_threads: int) -> None:
    def build() -> Contest:
        network, x = case.build()
        return network_contest(
            case.name, network, x, folder=CACHE, threads=cpu_threads, turn_ms=TURN_MS[case.image_size]
        )

    compete("network", case, build)
