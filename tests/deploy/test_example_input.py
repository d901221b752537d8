"""An example image that the model cannot take is distinguished from a model that cannot be compacted or written."""

from __future__ import annotations

import copy

import pytest
import torch

import gatedconv
from gatedconv.gating.losses import accumulating
from tests.convert.networks import IMAGES, network
from tests.tolerances import assert_close


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
        ((IMAGES.to("meta"),), TypeError, "hold data.* meta"),
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


class Half(torch.nn.Module):
    """More than half of a vector (N, K), or of a clip's frames, as images: a slice that a graph cannot compute."""

    def __init__(self, channels):
        super().__init__()
        self.first = torch.nn.Conv2d(channels, 8, 1)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.head = torch.nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = x[:, : x.shape[1] // 2 + 1]
        maps = x[:, None, None] if x.dim() == 2 else x.mean(1)
        return self.head(self.net(self.first(maps).relu())).mean((2, 3))


@pytest.mark.parametrize(
    ("channels", "size", "other"), [(1, (2, 128), (3, 200)), (3, (2, 4, 3, 8, 8), (2, 6, 3, 8, 8))]
)
def test_a_graph_of_one_size_refuses_another(channels, size, other, tmp_path):
    torch.manual_seed(0)
    model = Half(channels).eval()
    gated = gatedconv.gate_model(model, "channel", example_input=torch.randn(size))
    gatedconv.save(gated, tmp_path / "m")
    loaded, x = gatedconv.load(tmp_path / "m"), torch.randn(other)
    assert_close(loaded(x[:, : size[1]]), gated(x[:, : size[1]]))
    with pytest.raises(ValueError, match=f"for inputs of {size[1]}.*got {other[1]}"):
        loaded(x)


def test_attributes_of_the_users_own_are_left_alone(frozen):
    frozen = copy.deepcopy(frozen)
    frozen.fixed_size = frozen.rate_window = 224
    small = gatedconv.compact(frozen, IMAGES)
    with accumulating(small, None):
        pass
    assert small.fixed_size == small.rate_window == 224
