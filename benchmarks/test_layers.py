"""Single convolutions with some of their outputs closed: our operator against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.conftest import as_parameters
from benchmarks.layers import CASES, LayerCase, compare_layers


@pytest.mark.parametrize("case", as_parameters(CASES))
def test_layer(case: LayerCase, compete: Callable[..., None]) -> None:
    compete("layer", case, lambda: compare_layers(case))
