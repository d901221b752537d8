"""The teacher within a run: what it averages, what it says, what that adds to the loss; a resumed run keeps it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gatedconv.data import ImageData
from gatedconv.models.resnet import ResNet
from gatedconv.train import RunFolder, TrainConfig, run, train
from gatedconv.train.listener import Listener
from gatedconv.train.stopping import StopRequest
from gatedconv.train.teacher import SPAN, Teacher
from tests.train.test_loop import assert_same_state, comparable, network

CONFIG = TrainConfig(
    epochs=4, batch_size=16, lr=0.05, gate="channel", position="middle", polar_schedule="constant",
    mac_control="rank", mac_ramp=(0.3, 0.5), consensus_at=0.5, teacher_at=0.3, teacher_weight=0.6, device="cpu",
    latency=False,
)  # fmt: skip
ALONE = dataclasses.replace(CONFIG, mac_control="none", consensus_at=1.0)


def test_the_average_forgets_over_its_span() -> None:
    model, teacher = nn.Linear(1, 1, bias=False), Teacher(CONFIG)
    nn.init.constant_(model.weight, 1.0)
    teacher.begin(model)
    expected, before = 1.0, 0.0
    for progress, weight in ((0.01, 2.0), (0.03, -1.0), (0.035, 5.0)):
        nn.init.constant_(model.weight, weight)
        teacher.follow(progress)
        expected += (weight - expected) * (progress - before) / SPAN
        before = progress
    assert teacher.state_dict()["average"]["weight"].item() == pytest.approx(expected)
    nn.init.constant_(model.weight, 7.0)
    teacher.follow(0.9)  # longer ago than the span: nothing is left of what was before
    assert teacher.state_dict()["average"]["weight"].item() == 7.0


def test_it_answers_like_the_whole_network_with_the_averaged_weights(data: ImageData) -> None:
    """The oracle is a network that never had gates, in training mode: the statistics are the batch's."""
    torch.manual_seed(3)
    model, teacher = network(CONFIG), Teacher(CONFIG)
    teacher.begin(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            (weight.fill_(-30.0) if "gate" in name else weight.add_(torch.randn_like(weight), alpha=0.1))
    teacher.follow(0.4 * SPAN)
    dense, start = ResNet(8, 3, input_size=(1, 8, 8)).train(), network(CONFIG)
    with torch.no_grad():
        mine, before = dict(model.named_parameters()), dict(start.named_parameters())
        for name, weight in dense.named_parameters():
            weight.copy_(0.6 * before[name] + 0.4 * mine[name])
    images = torch.randn(9, 1, 8, 8)
    answer = teacher(images)
    torch.testing.assert_close(answer, dense(images).detach(), rtol=1e-4, atol=1e-5)
    assert not answer.requires_grad
    torch.testing.assert_close(teacher(images), answer)  # nothing in it moves


def test_the_loss_is_that_of_the_formula_and_the_lesson_ends_with_the_run() -> None:
    random = np.random.default_rng(0)
    mine, theirs, task = random.normal(size=(5, 3)), random.normal(size=(5, 3)), 1.25
    teacher, soft = Teacher(dataclasses.replace(CONFIG, teacher_temperature=4.0)), 4.0
    p, q = (np.exp(z / soft) / np.exp(z / soft).sum(1, keepdims=True) for z in (theirs, mine))
    divergence = (p * np.log(p / q)).sum(1).mean()
    for progress, weight in ((0.3, 0.6), (0.65, 0.3), (1.0, 0.0)):
        found = teacher.lesson(torch.tensor(task), torch.tensor(mine), torch.tensor(theirs), progress)
        assert found.item() == pytest.approx((1 - weight) * task + weight * soft**2 * divergence, rel=1e-5)


def test_steps_before_it_begins_are_those_of_a_run_without_it(data: ImageData) -> None:
    runs = []
    for at in (0.5, 1.0):
        config = dataclasses.replace(ALONE, teacher_at=at)
        runs.append(comparable(list(train(network(config), data, config))))
    assert runs[0][:2] == runs[1][:2]
    assert all(
        taught["train_loss"] != alone["train_loss"] for taught, alone in zip(*(r[2:] for r in runs), strict=True)
    )


def test_its_lessons_are_counted(data: ImageData) -> None:
    """Three steps of 16 images in an epoch; a forward pass each from half of the run on."""
    config = dataclasses.replace(ALONE, teacher_at=0.5)
    model = network(config)
    lines = list(train(model, data, config))
    per_image = sum(term.macs for term in model.mac_terms)
    assert [line.train_macs for line in lines] == pytest.approx([48 * n * per_image for n in (3, 3, 4, 4)])


@pytest.mark.parametrize("epochs_first", [1, 2, 3])
def test_a_training_goes_on_with_its_teacher(tmp_path: Path, data: ImageData, epochs_first: int) -> None:
    straight = network(ALONE)
    whole = list(train(straight, data, ALONE))
    path = tmp_path / "part.pt"
    list(itertools.islice(train(network(ALONE), data, ALONE, checkpoint=path), epochs_first))
    resumed = network(ALONE, seed=9)
    assert comparable(list(train(resumed, data, ALONE, checkpoint=path, resume=True))) == comparable(whole)
    assert_same_state(straight.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_what_is_cut_is_taught_by_what_it_was_cut_from(
    tmp_path: Path, archive: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatedconv.train.finish.write_exports", lambda *_: [])
    config = dataclasses.replace(CONFIG, data=f"npz:{archive}")
    whole, part, plain = (RunFolder(tmp_path / name) for name in ("whole", "part", "plain"))
    expected = run(config, whole)
    assert expected is not None and expected["epochs"] == {"gated": 2, "cut": 2}
    assert run(dataclasses.replace(config, teacher_at=1.0), plain) is not None
    taught, alone = whole.read_metrics(), plain.read_metrics()
    assert taught[2].train_loss != alone[2].train_loss
    assert taught[3].train_macs > alone[3].train_macs > 0
    stop = StopRequest()

    class Stopping(Listener):
        def epoch(self, metrics: Any) -> None:
            if metrics.epoch == stop_after:
                stop.make()

    assert run(config, part, listener=Stopping(), stop=stop) is None
    assert run(config, part, resume=True) is not None
    assert comparable(part.read_metrics()) == comparable(taught)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_at": 0.0}, "teacher_at: expected above 0.0 and at most 1.0, got 0.0"),
        ({"teacher_at": 0.6}, "teacher_at: expected at most consensus_at 0.5, the whole network is gone by then"),
        ({"teacher_weight": 0.0}, "teacher_weight: expected above 0.0 and at most 1.0, got 0.0"),
        ({"teacher_weight": 1.5}, "teacher_weight: expected above 0.0 and at most 1.0, got 1.5"),
        ({"teacher_temperature": 0.0}, "teacher_temperature: expected above 0.0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
