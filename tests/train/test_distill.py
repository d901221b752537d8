"""The teacher within a run: a dense network that trains along, what it adds to the loss; a resumed run keeps it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.data import ImageData
from gatedconv.gating import find_gates
from gatedconv.train import Callback, RunFolder, TrainConfig, run
from gatedconv.train.build import build_model
from gatedconv.train.config import require_same_recipe
from gatedconv.train.distill import FinishedTeacher, Teacher
from gatedconv.train.recipe import distillation_loss, train_batches
from gatedconv.train.step import Stepper
from gatedconv.train.stopping import StopRequest
from tests.tolerances import assert_close, near
from tests.train.steps import train
from tests.train.test_loop import assert_same_state, comparable, network

CONFIG = TrainConfig(
    epochs=4,
    batch_size=16,
    lr=0.05,
    gate="channel",
    position="middle",
    polar_schedule="constant",
    mac_control="rank",
    mac_ramp=(0.3, 0.5),
    consensus_at=0.5,
    teacher_at=0.3,
    teacher_weight=0.6,
    device="cpu",
    latency=False,
)
SINGLE = dataclasses.replace(CONFIG, mac_control="none", consensus_at=1.0)
DENSE = dataclasses.replace(SINGLE, gate="none", teacher_at=1.0)


def teacher(config: TrainConfig, seed: int = 7) -> Teacher:
    """One whose network has weights of its own until it becomes a copy."""
    return Teacher(config, lambda: network(DENSE, seed))


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2}, {"amp": "bf16"}, {"momentum": 0.0, "nesterov": False}], ids=lambda c: "-".join(c)
)
@pytest.mark.parametrize("at", [0.0, 0.4, 0.5])
def test_the_dense_network_trains_as_if_there_were_no_student(
    data: ImageData, at: float, changes: dict[str, Any]
) -> None:
    """The oracle is a training without gates; up to `teacher_at` it is the student's, whose gates stay open.

    A teacher that forgets momentum, sees other images or another learning rate, or has the distillation loss in its own
    ends elsewhere.
    """
    config = dataclasses.replace(SINGLE, teacher_at=at, polar_weight=0.0, **changes)
    student, dense, new_teacher = network(config), network(DENSE), teacher(config)
    student.load_state_dict(dense.state_dict(), strict=False)
    for gate in find_gates(student).values():
        for parameter in gate.parameters():
            nn.init.constant_(parameter, 0.0 if parameter.dim() > 1 else 30.0).requires_grad_(False)
    list(train(student, data, config, teacher=new_teacher))
    list(train(dense, data, dataclasses.replace(DENSE, **changes)))
    assert new_teacher.stepper is not None
    assert_same_state(new_teacher.stepper.model.state_dict(), dense.state_dict())
    assert not torch.equal(student.fc.weight, dense.fc.weight)


def test_a_network_that_was_never_dense_has_a_teacher_that_trains_from_the_start(data: ImageData) -> None:
    config = dataclasses.replace(SINGLE, teacher_at=0.5, subnetwork="even")
    new_teacher, student, dense = Teacher(config, lambda: network(DENSE)), network(DENSE, 3), network(DENSE)
    lines = list(train(student, data, config, phase="dense", teacher=new_teacher))
    list(train(dense, data, DENSE))
    assert new_teacher.stepper is not None
    assert_same_state(new_teacher.stepper.model.state_dict(), dense.state_dict())
    alone = list(train(network(DENSE, 3), data, DENSE, phase="dense"))
    assert [a.train_loss == b.train_loss for a, b in zip(lines, alone, strict=True)] == [True, True, False, False]


def test_the_loss_is_that_of_the_formula_and_trains_the_student_alone() -> None:
    random = np.random.default_rng(0)
    mine, theirs, task = random.normal(size=(5, 3)), random.normal(size=(5, 3)), 1.25
    p, q = (np.exp(z / 4) / np.exp(z / 4).sum(1, keepdims=True) for z in (theirs, mine))
    divergence = (p * np.log(p / q)).sum(1).mean()
    config = dataclasses.replace(CONFIG, teacher_temperature=4.0)
    logits, taught = (torch.tensor(z, requires_grad=True) for z in (mine, theirs))
    found = distillation_loss(torch.tensor(task), logits, taught, config)
    assert found.item() == near(0.4 * task + 0.6 * 16 * divergence, terms=5 * 3)
    found.backward()
    assert taught.grad is None
    assert logits.grad is not None
    assert_close(logits.grad.numpy(), 0.6 * 4 * (q - p) / 5, dtype=torch.float32)


def test_steps_before_it_begins_are_those_of_a_run_without_it(data: ImageData) -> None:
    runs = []
    for at in (0.5, 1.0):
        config = dataclasses.replace(SINGLE, teacher_at=at)
        new_teacher = teacher(config) if at < 1 else None
        runs.append(comparable(list(train(network(config), data, config, teacher=new_teacher))))
    assert runs[0][:2] == runs[1][:2]
    assert all(
        taught["train_loss"] != alone["train_loss"] for taught, alone in zip(*(r[2:] for r in runs), strict=True)
    )


def test_its_steps_are_counted(data: ImageData) -> None:
    """Three steps of 16 images in an epoch; from half of the run on two networks make them."""
    config = dataclasses.replace(SINGLE, teacher_at=0.5)
    model = network(config)
    lines = list(train(model, data, config, teacher=teacher(config)))
    mine, whole = (sum(term.macs for term in net.mac_terms) for net in (model, network(DENSE)))
    expected = [48 * 3 * macs for macs in (mine, mine, mine + whole, mine + whole)]
    assert [line.train_macs for line in lines] == pytest.approx(expected)


@pytest.mark.parametrize("epochs_first", [1, 2, 3])
def test_a_training_resumes_with_its_teacher(tmp_path: Path, data: ImageData, epochs_first: int) -> None:
    straight, new_teacher, again = network(SINGLE), teacher(SINGLE), teacher(SINGLE, seed=8)
    whole = list(train(straight, data, SINGLE, teacher=new_teacher))
    path = tmp_path / "part.pt"
    list(itertools.islice(train(network(SINGLE), data, SINGLE, checkpoint=path, teacher=teacher(SINGLE)), epochs_first))
    resumed = network(SINGLE, seed=9)
    lines = list(train(resumed, data, SINGLE, checkpoint=path, resume=True, teacher=again))
    assert comparable(lines) == comparable(whole)
    assert_same_state(straight.state_dict(), resumed.state_dict())
    assert new_teacher.stepper is not None
    assert again.stepper is not None
    assert_same_state(new_teacher.state_dict(), again.state_dict())


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_compact_network_keeps_its_teacher(
    tmp_path: Path, archive: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])
    config = dataclasses.replace(CONFIG, data=f"npz:{archive}")
    whole, part, plain = (RunFolder(tmp_path / name) for name in ("whole", "part", "plain"))
    expected = run(config, whole)
    assert expected is not None and expected["epochs"] == {"gated": 2, "compact": 2}
    assert run(dataclasses.replace(config, teacher_at=1.0), plain) is not None
    taught, alone = whole.read_metrics(), plain.read_metrics()
    assert taught[2].train_loss != alone[2].train_loss
    assert taught[3].train_macs > alone[3].train_macs > 0
    stop = StopRequest()

    class Stopping(Callback):
        def epoch(self, metrics: Any) -> None:
            if metrics.epoch == stop_after:
                stop.request()

    assert run(config, part, callback=Stopping(), stop=stop) is None
    found = run(config, part, resume=True)
    assert found is not None
    assert comparable(part.read_metrics()) == comparable(taught)
    # The whole network is an outcome too.
    assert found["dense"] == expected["dense"]
    assert found["dense"]["macs"] > found["frozen"]["macs"]
    nets = [gatedconv.load(folder.model("dense")) for folder in (whole, part)]
    assert_same_state(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.parametrize("at", [0.5, 0.49])
def test_it_begins_an_epoch_before_the_consensus_at_the_latest(tmp_path: Path, archive: Path, at: float) -> None:
    config = dataclasses.replace(CONFIG, data=f"npz:{archive}", teacher_at=at, mac_control="none")
    found = run(config, RunFolder(tmp_path / "run"))
    assert found is not None
    assert found["taught"]
    assert found["epochs"] == {"gated": 2, "compact": 2}
    first, second = RunFolder(tmp_path / "run").read_metrics()[:2]
    assert second.train_macs > 1.5 * first.train_macs


def test_statistics_that_a_bad_step_broke_are_not_copied(data: ImageData) -> None:
    """On a GPU bad steps are repaired now and then only; the copy may come in between."""
    student, new_teacher = Stepper(network(SINGLE), SINGLE, torch.device("cpu")), teacher(SINGLE)
    new_teacher.begin(student)
    student.guard.count(torch.tensor(True))
    student.model.bn1.running_mean.fill_(math.nan)
    new_teacher(torch.randn(8, 1, 8, 8), torch.arange(8) % 3, 2.0)
    assert new_teacher.stepper is not None
    assert all(value.isfinite().all() for value in new_teacher.stepper.model.state_dict().values())


def test_settings_of_a_teacher_that_is_not_there_are_no_part_of_the_recipe() -> None:
    now = dataclasses.replace(CONFIG, teacher_at=1.0)
    require_same_recipe({**vars(now), "teacher_temperature": 2.0}, now, "here")
    with pytest.raises(ValueError, match="here: expected teacher_temperature 4.0, found 2.0"):
        require_same_recipe({**vars(CONFIG), "teacher_temperature": 2.0}, CONFIG, "here")


def test_a_student_of_another_network_is_refused(data: ImageData) -> None:
    with pytest.raises(ValueError, match="teacher: expected a gated form of the dense network, it lacks"):
        list(train(network(SINGLE), data, SINGLE, teacher=Teacher(SINGLE, lambda: nn.Conv2d(3, 4, 1))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_at": -0.1}, "teacher_at: expected at least 0.0 and at most 1.0, got -0.1"),
        ({"teacher_at": 0.4}, "teacher_at: expected at most 0.3, where mac_ramp begins to prune"),
        ({"teacher_at": 0.6, "mac_control": "none"}, "teacher_at: expected at most consensus_at 0.5, where"),
        ({"gate": "none", "mac_control": "none", "consensus_at": 1.0}, "teacher_at: expected a gate"),
        ({"dense_baseline": True}, "teacher_at: expected dense_baseline off"),
        ({"teacher_weight": 0.0}, "teacher_weight: expected above 0.0 and at most 1.0, got 0.0"),
        ({"teacher_weight": 1.5}, "teacher_weight: expected above 0.0 and at most 1.0, got 1.5"),
        ({"teacher_temperature": 0.0}, "teacher_temperature: expected above 0.0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_finished_network_teaches_and_stays_as_it_is(
    tmp_path: Path, archive: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is that of its logits, whose forward passes are counted; a resumed run needs the same file."""
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])
    dense, file = build_model(CONFIG, data, gated=False), tmp_path / "dense.safetensors"
    dense.fc.weight.data.mul_(3)
    gatedconv.save(dense, file)
    before = file.read_bytes()
    part = {"subnetwork": "even", "mac_control": "none", "consensus_at": 1.0, "data": f"npz:{archive}"}
    config = dataclasses.replace(CONFIG, **part, teacher_at=0.5, teacher_file=str(file))
    taught, alone = RunFolder(tmp_path / "taught"), RunFolder(tmp_path / "alone")
    run(config, taught)
    run(dataclasses.replace(config, teacher_at=1.0, teacher_file=""), alone)
    lines, plain = taught.read_metrics(), alone.read_metrics()
    assert [a.train_loss == b.train_loss for a, b in zip(lines, plain, strict=True)] == [True, True, False, False]
    images = CONFIG.batch_size * (len(data.train_labels) // CONFIG.batch_size)
    more = images * sum(term.macs for term in dense.mac_terms)  # one pass, forward
    assert [a.train_macs - b.train_macs for a, b in zip(lines, plain, strict=True)] == pytest.approx([0, 0, more, more])
    assert file.read_bytes() == before
    teacher = FinishedTeacher(config, build_model(CONFIG, data, gated=False))
    images, labels = next(iter(train_batches(config, data)))
    with torch.no_grad():
        assert torch.equal(teacher(images, labels, 3.0), dense.eval()(images))
    assert teacher(images, labels, 1.9) is None
    state = teacher.state_dict()
    dense.fc.weight.data.mul_(2)
    gatedconv.save(dense, file)
    with pytest.raises(ValueError, match="another file than the run began with"):
        FinishedTeacher(config, build_model(CONFIG, data, gated=False)).load_state_dict(state)
    gatedconv.save(gatedconv.models.resnet32(), file)
    with pytest.raises(ValueError, match=r"teacher_file: expected the weights of resnet20, dense, in .*dense"):
        run(config, RunFolder(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="teacher_file: expected teacher_at below 1"):
        dataclasses.replace(config, teacher_at=1.0)
