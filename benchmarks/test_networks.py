"""Networks, dense and compact, in our engine and in other CPU runtimes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.conftest import CACHE, as_parameter
from benchmarks.networks import CASES, NetworkCase
from gatedconv.bench.comparison import Comparison, compare_runtimes
from gatedconv.bench.runtimes import SETTINGS

SAMPLE_MS = {32: 25.0, 224: 60.0}

# torch.compile runs the code of its ahead-of-time package plus a check of guards. It takes longest to prepare, so it is
# measured on the smaller network of each kind.
JIT, WITH_JIT = "freezing, channels_last", ("resnet56", "resnet18")


@pytest.mark.timeout(540)
@pytest.mark.parametrize("case", [as_parameter(case, f"{case.name} batch {case.batch}", case.quick) for case in CASES])
def test_network(case: NetworkCase, compete: Callable[[Comparison], None], cpu_threads: int) -> None:
    network, x = case.build()
    settings = [setting for setting in SETTINGS if setting.name != JIT or case.model in WITH_JIT]
    options: dict[str, Any] = {"folder": CACHE, "threads": cpu_threads, "sample_ms": SAMPLE_MS[case.image_size]}
    compete(compare_runtimes(case.name, network, x, settings=settings, **options))
