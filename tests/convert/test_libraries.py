"""Networks of libraries that need not be installed."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", ["Unet", "FPN", "DeepLabV3Plus", "PSPNet"])
def test_segmentation_models(name, tmp_path):
    library = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    make = getattr(library, name)
    options = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3}
    x, model = torch.randn(2, 3, 64, 64), make(**options)
    model(x)  # running statistics
    gated = gatedconv.gate_model(model.eval(), "both", example_input=x)
    gates = gatedconv.gates(gated)
    assert not any(path.startswith("segmentation_head") for path in gates)  # scores of classes
    masks = {name: torch.arange(gate.num_gates) % 3 != 1 for name, gate in gates.items()}
    frozen = gatedconv.freeze(gated, masks=masks)
    small = gatedconv.compact(frozen, x)
    assert type(small) is type(model) and isinstance(small.encoder, type(model.encoder))
    gatedconv.save(small, tmp_path / "small")
    loaded = gatedconv.load(tmp_path / "small", into=make(**options).eval())
    with torch.no_grad():
        for images in (x, torch.randn(1, 3, 96, 64)):
            assert_close(gated(images), model(images))
            for found in (small, loaded):
                assert_close(found(images), frozen(images))
    assert sum(map(torch.numel, small.parameters())) < sum(map(torch.numel, model.parameters()))
