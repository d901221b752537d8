"""Single convolutions with some of their outputs closed: our operator against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.conftest import as_parameter
from benchmarks.masked_conv2d import CASES, is_quick
from gatedconv.bench.comparison import Comparison
from gatedconv.bench.conv_case import ConvCase, compare_layers


@pytest.mark.parametrize("case", [as_parameter(case, str(case), is_quick(case)) for case in CASES])
def test_layer(case: ConvCase, compete: Callable[[Comparison], None]) -> None:
    compete(compare_layers(case))
