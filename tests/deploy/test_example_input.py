"""An example image that the model cannot take is told apart from a model that cannot be compacted or written."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from tests.convert.networks import IMAGES, network


@pytest.fixture(scope="module")
def frozen():
    gated = gatedconv.gate_model(network("relu"), "channel", example_input=IMAGES)
    return gatedconv.freeze(gated, masks={n: torch.arange(g.num_gates) > 1 for n, g in gatedconv.gates(gated).items()})


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES.double(), ValueError, r"does not run on example_input .*float64, on cpu"),
        (IMAGES[:, :2], ValueError, r"does not run on example_input \(\(2, 2, 12, 12\)"),
        (IMAGES.long(), TypeError, "floating-point type .*int64"),
        (IMAGES.to("meta"), TypeError, "hold data.* meta"),
    ],
)
def test_compact_names_what_is_wrong_with_the_image(frozen, images, error, message):
    with pytest.raises(error, match=f"compact: .*{message}"):
        gatedconv.compact(frozen, images)


def test_export_names_what_is_wrong_with_the_image(frozen, tmp_path):
    small = gatedconv.compact(frozen, IMAGES)
    for images in (IMAGES.double(), IMAGES[:, :2]):
        with pytest.raises(ValueError, match="export: .* does not run on example_input"):
            gatedconv.export(small, tmp_path / "model.pt2", images, format="torch")
    assert not list(tmp_path.iterdir())


def test_a_batch_without_images_is_example_enough(frozen, tmp_path):
    small = gatedconv.compact(frozen, IMAGES[:0])
    torch.testing.assert_close(small(IMAGES), frozen(IMAGES))
    gatedconv.export(small, tmp_path / "model.pt2", IMAGES[:0], format="torch")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(IMAGES), small(IMAGES))
