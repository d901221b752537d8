"""Averaged weights: the means, what is left out, and a run that ends with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gatedconv.data import ImageData
from gatedconv.models import cifar_vgg, resnet20
from gatedconv.train.checkpoint import CheckpointError, restore_part
from gatedconv.train.config import TrainConfig
from gatedconv.train.loop import Training
from gatedconv.train.optimizer import LOOKAHEAD_EVERY, Lookahead

QUICK = {"epochs": 2, "batch_size": 16, "device": "cpu", "amp": "off", "gate": "channel", "position": "middle"}


def test_every_fifth_step_weights_become_the_mean_of_themselves_and_their_running_mean() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    averaged = Lookahead(model, 0.8)
    weight, start = model[0].weight, model[0].weight.detach().clone()
    for _ in range(LOOKAHEAD_EVERY):
        with torch.no_grad():
            weight += 1
            model[1].running_mean += 1
        averaged.step(0.5)
    kept = 0.8 * 0.5**3
    assert torch.allclose(weight, start + LOOKAHEAD_EVERY * (1 - kept))
    assert torch.allclose(model[1].running_mean, torch.full((2,), LOOKAHEAD_EVERY * (1 - kept)))
    with torch.no_grad():
        weight += 7
    averaged.finish()
    assert torch.allclose(weight, start + LOOKAHEAD_EVERY * (1 - kept))


def test_gates_are_left_out() -> None:
    """A mean would open gates that were pruned."""
    model = cifar_vgg(10, "channel", widths=(8, 8, 8))
    names = Lookahead(model, 0.5).means.keys()
    assert "group1.conv1.weight" in names and not [name for name in names if "gate" in name]


def test_a_run_ends_with_the_means_and_resumes_with_them(data: ImageData, tmp_path: Path) -> None:
    config = TrainConfig(**QUICK, lookahead=0.9, checkpoint_minutes=1e-6)
    torch.manual_seed(0)
    straight = Training(
        resnet20(data.num_classes, "channel", "middle", input_size=data.image_shape), data, config, phase="gated"
    )
    initial = {name: value.clone() for name, value in straight.model.state_dict().items()}
    list(straight.epochs(False))
    means = straight.stepper.lookahead.means
    assert all(torch.equal(straight.model.state_dict()[name], mean) for name, mean in means.items())

    def part(resume: bool, stop_at: int) -> Training:
        model = resnet20(data.num_classes, "channel", "middle", input_size=data.image_shape)
        model.load_state_dict(initial)
        steps = iter(range(1, 10**6))
        found = Training(
            model, data, config, phase="gated", checkpoint=tmp_path / "c.pt", stop=lambda: next(steps) > stop_at
        )
        list(found.epochs(resume))
        return found

    part(False, 2)
    resumed = part(True, 10**6)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_checkpoint_with_another_content_is_named(tmp_path: Path) -> None:
    part = Lookahead(nn.Linear(2, 2), 0.5)
    with pytest.raises(CheckpointError, match="another model: lookahead: expected means and steps"):
        restore_part({"lookahead": {"means": [], "steps": 0}}, tmp_path, "lookahead", part)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_shares_outside_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="lookahead: expected at least 0.0 and at most 0.999"):
        TrainConfig(lookahead=value)
