"""Real architectures: a few in every run, all of docs/models.md with GATEDCONV_ARCHITECTURES=all."""

from __future__ import annotations

import os

import pytest

from tests.convert.architectures import examine
from tests.convert.zoo import NAMED

QUICK = ("torchvision/resnet18", "torchvision/shufflenet_v2_x1_0", "timm/lcnet_050")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED if os.environ.get("GATEDCONV_ARCHITECTURES") == "all" else QUICK)
def test_an_architecture_is_gated_trained_cut_and_exact(name):
    pytest.importorskip(name.split("/")[0])
    row = examine(name, onnx=name == QUICK[0], train=True)
    assert not row.failures
    assert row.ok and row.trained, row
    assert row.gates >= 13 and row.reach > 0.6 and row.removed["0.3"] > row.removed["0.7"] > 0.15
    assert row.onnx is None or row.onnx <= 1e-4
    assert row.engine is not None and row.engine <= 1e-4
    assert max(row.seconds) < 10
