from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedconv.data import ImageData, TrainBatches, validation_view
from gatedconv.gating import GatePruner, expected_macs, find_gates
from gatedconv.models.resnet import ResNet
from gatedconv.train import CheckpointError, EpochMetrics, NonFiniteLoss, TrainConfig
from gatedconv.train.checkpoint import load_checkpoint, pack_state, previous_path, save_checkpoint
from gatedconv.train.step import Stepper
from tests.tolerances import in_decimals
from tests.train.steps import train

CONFIG = TrainConfig(epochs=4, batch_size=16, lr=0.05, mac_weight=1.0, gate_warmup=0.2, act_weight=0.1)


def network(config: TrainConfig = CONFIG, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    gate = None if config.gate == "none" else config.gate
    return ResNet(8, 3, gate, config.position, estimator=config.estimator, input_size=(1, 8, 8))


def comparable(metrics: list[EpochMetrics]) -> list[dict[str, Any]]:
    return [{**line.as_dict(), "seconds": 0.0, "core_seconds": 0.0} for line in metrics]


def assert_same_state(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for a, b in zip(left, right, strict=True):
            assert_same_state(a, b)
    else:
        assert left == right


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "none"},
        {"gate": "channel", "position": "middle", "estimator": "bernoulli"},
        {"gate": "both", "estimator": "gumbel", "grad_clip": 1.0, "label_smoothing": 0.1, "schedule": "staged"},
        {"amp": "bf16", "channels_last": False},
    ],
    ids=["layer", "dense", "channel-bernoulli", "both-gumbel", "bf16"],
)
@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_resume_is_exact(tmp_path: Path, data: ImageData, changes: dict[str, Any], damaged: bool) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    straight = network(config)
    whole = list(train(straight, data, config, checkpoint=tmp_path / "straight.pt"))

    path = tmp_path / "interrupted.pt"
    list(itertools.islice(train(network(config), data, config, checkpoint=path), 3))
    if damaged:
        path.write_bytes(path.read_bytes()[:-7])
    torch.rand(5)  # whatever happened to the global generator in between must not matter
    resumed = network(config, seed=9)
    notes: list[str] = []
    joined = list(train(resumed, data, config, checkpoint=path, resume=True, on_note=notes.append))

    assert [str(previous_path(path)) in note for note in notes] == [True] * damaged
    assert [line.epoch for line in joined] == [1, 2, 3, 4]
    assert comparable(joined) == comparable(whole)
    assert_same_state(straight.state_dict(), resumed.state_dict())
    ends = [load_checkpoint(tmp_path / name) for name in ("straight.pt", "interrupted.pt")]
    assert_same_state(*(end["optimizer"] for end in ends))
    assert_same_state(*(end["random"] for end in ends))


@pytest.mark.parametrize("changes", [{}, {"accumulate": 4}], ids=["whole", "accumulated"])
def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path: Path, data: ImageData, changes: dict[str, Any]) -> None:
    """With accumulation the losses remember open rates of the step before."""
    config = dataclasses.replace(CONFIG, epochs=2, **changes)
    straight = network(config)
    whole = list(train(straight, data, config))
    path, steps = tmp_path / "interrupted.pt", itertools.count()  # asked before the epoch, then after its steps
    interrupted = list(train(network(config), data, config, checkpoint=path, stop=lambda: next(steps) == 2))
    assert interrupted == [] and load_checkpoint(path)["random"]["position"] == 2
    resumed = network(config, seed=9)
    joined = list(train(resumed, data, config, checkpoint=path, resume=True))
    assert comparable(joined) == comparable(whole)
    assert_same_state(straight.state_dict(), resumed.state_dict())


def test_a_seed_repeats_and_another_differs(data: ImageData) -> None:
    def final(seed: int) -> Tensor:
        config = dataclasses.replace(CONFIG, seed=seed, epochs=1)
        model = network(config)
        list(train(model, data, config))
        return model.fc.weight

    assert torch.equal(final(1), final(1))
    assert not torch.equal(final(1), final(2))


def test_it_learns_and_the_metrics_show_it(data: ImageData) -> None:
    config = dataclasses.replace(CONFIG, epochs=25, batch_size=8, mac_target=0.6, lr=0.1)
    model = network(config)
    lines = list(train(model, data, config))
    assert lines[-1].test_top1 >= 95 and lines[0].train_loss > 2 * lines[-1].train_loss
    assert list(lines[0].gate_open_rates) == list(find_gates(model))
    assert lines[0].num_gates == 3
    for line in lines:
        assert 0 <= line.polarization <= 0.25
        assert line.gates_dead <= line.gates_saturated <= 3
        # One gate per module: their mean is the overall open rate.
        assert line.open_rate == in_decimals(sum(line.gate_open_rates.values()) / 3, 5)


def test_gates_are_counted_on_training_batches(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation leaves its own logits in the gates; the counters must not see them."""

    def shutting(model: nn.Module, batches: Any, *others: Any) -> tuple[float, float]:
        for gate in find_gates(model).values():
            gate.logits = torch.full_like(gate.logits, -50.0)
        return 1.0, 50.0

    monkeypatch.setattr("gatedconv.train.loop.evaluate", shutting)
    (line,) = train(network(), data, dataclasses.replace(CONFIG, epochs=1))
    assert line.num_gates == 3 and line.gates_dead < 3 and line.gates_saturated < 3


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_state_of_the_runs_own_device_is_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *device: asked.append(*device) or torch.zeros(1))

    class Labels:
        is_cuda = device != "cpu"

        def __init__(self) -> None:
            self.device = torch.device(device)

        def __len__(self) -> int:
            return 3

        def cpu(self) -> torch.Tensor:
            return torch.zeros(3)

    batches: Any = SimpleNamespace(labels=Labels(), state=dict)
    state = pack_state({}, batches, CONFIG, "gated", [])
    assert ("cuda" in state["random"]) == (device != "cpu")
    assert asked == ([] if device == "cpu" else [torch.device(device)])


@pytest.mark.parametrize("end", [0.5, 0.55, 1.0])
def test_a_ramp_that_ends_with_the_gated_phase_reaches_its_target(
    monkeypatch: pytest.MonkeyPatch, data: ImageData, end: float
) -> None:
    changes = {"mac_weight": 0.0, "mac_control": "rank", "mac_ramp": (0.0, end), "consensus_at": end}
    config = dataclasses.replace(CONFIG, gate="channel", position="middle", **changes)
    model, shares, prune = network(config), [], GatePruner._prune
    gates = find_gates(model)
    sizes = [gate.num_gates for gate in gates.values()]
    full = float(expected_macs(model, {name: torch.ones(gate.num_gates) for name, gate in gates.items()}))

    def pruned(pruner: GatePruner, target: float) -> None:
        prune(pruner, target)
        rates = torch.cat([gate.open_rate.detach() for gate in gates.values()]).masked_fill(pruner.pruned, 0)
        shares.append(float(expected_macs(model, dict(zip(gates, rates.split(sizes), strict=True)))) / full)

    monkeypatch.setattr(GatePruner, "_prune", pruned)
    for _ in train(model, data, config):
        pass
    assert shares[-1] <= config.mac_target * 1.001


def test_a_mac_target_moves_the_macs(data: ImageData) -> None:
    final = {}
    for target in (0.4, 1.0):
        config = dataclasses.replace(
            CONFIG, epochs=14, batch_size=8, mac_target=target, mac_weight=5.0, act_weight=0.0, polar_weight=0.5
        )
        final[target] = list(train(network(config), data, config))[-1].macs
    assert final[0.4] < 0.65 and final[1.0] > 0.9


class Failing(nn.Module):
    """A dense network whose logits become NaN in some of its training steps, counted from 1."""

    def __init__(self, steps: range | tuple[int, ...]) -> None:
        super().__init__()
        self.inner = network(dataclasses.replace(CONFIG, gate="none"))
        self.steps, self.calls = steps, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        # The batch itself is broken: running statistics would be, too.
        logits: Tensor = self.inner(x * math.nan if self.training and self.calls in self.steps else x)
        return logits


def test_the_last_good_checkpoint_survives_steps_of_nan(tmp_path: Path, data: ImageData) -> None:
    path = tmp_path / "gated.pt"
    seen = []
    message = r"not finite in 4 steps in a row, last in epoch 3, step 2 of 3 .* kept at .*gated\.pt"
    with pytest.raises(NonFiniteLoss, match=message):
        for line in train(Failing(range(5, 99)), data, CONFIG, checkpoint=path, on_note=lambda text: None):
            seen.append(line)
    assert [line.steps_skipped for line in seen] == [0, 2]
    state = load_checkpoint(path)
    assert state["epoch"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("first", [1, 5])
def test_a_step_of_nan_changes_nothing_but_the_batches_seen(data: ImageData, first: int) -> None:
    """Weights, momentum and running statistics after a bad step are those before it."""
    notes: list[str] = []
    model = Failing((first,))
    (line,) = list(train(model, data, dataclasses.replace(CONFIG, epochs=1, batch_size=6), on_note=notes.append))
    assert line.steps_skipped == 1 and notes == [
        "gated: epoch 1: 1 of 8 steps had a loss or gradient that is not finite and were skipped"
    ]
    expected = Failing(())
    config = dataclasses.replace(CONFIG, gate="none", epochs=1, batch_size=6)
    batches = TrainBatches(data, 6, seed=config.seed, memory_format=torch.channels_last)
    expected.to(memory_format=torch.channels_last).train()
    stepper = Stepper(expected, config, torch.device("cpu"))
    for number, (images, labels) in enumerate(batches, start=1):
        if number != first:
            stepper(images, labels, (number - 1) / 8)
    assert_same_state(model.state_dict(), expected.state_dict())
    assert line.train_loss > 0 and math.isfinite(line.train_loss)


@pytest.mark.parametrize("first", [1, 4])
def test_a_checkpoint_within_an_epoch_holds_nothing_broken(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """As on a GPU, where bad steps are judged now and then only: right after one, before a restart and after it."""
    for module in ("loop", "step"):
        monkeypatch.setattr(f"gatedconv.train.{module}.checks_immediately", lambda device: False)
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=6)
    path, steps = tmp_path / "gated.pt", itertools.count(1)

    def saved(model: nn.Module, at: int, resume: bool) -> dict[str, Tensor]:
        stop = lambda: next(steps) == at  # noqa: E731
        assert not list(train(model, data, config, checkpoint=path, resume=resume, stop=stop, on_note=lambda text: 0))
        found: dict[str, Tensor] = load_checkpoint(path)["model"]
        return found

    # Asked once between epochs, then after each step.
    before = saved(Failing((1,) if first == 1 else ()), 5 if first == 4 else 2, resume=False)
    assert all(value.isfinite().all() for value in before.values())
    if first == 4:
        steps = itertools.count(1)
        after = saved(Failing((1,)), 2, resume=True)
        statistics = [name for name in before if "running" in name]
        assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)


def test_bad_steps_in_a_row_are_counted_across_a_restart(tmp_path: Path, data: ImageData) -> None:
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=6)
    path, steps = tmp_path / "gated.pt", itertools.count(1)
    stop = lambda: next(steps) == 4  # noqa: E731
    assert not list(train(Failing((2, 3)), data, config, checkpoint=path, stop=stop))
    with pytest.raises(NonFiniteLoss, match="4 steps in a row, last in epoch 1, step 5 of 8"):
        list(train(Failing((1, 2)), data, config, checkpoint=path, resume=True))


@pytest.mark.parametrize("position", [0, 2])
def test_a_run_resumes_where_random_numbers_are_made_otherwise(tmp_path: Path, data: ImageData, position: int) -> None:
    """A GPU's generators have states of 16 bytes; the steps that are left are made, on other random numbers."""
    config = dataclasses.replace(CONFIG, epochs=2)
    path, steps = tmp_path / "gated.pt", itertools.count(1)
    at = 3 if position else 4  # asked between epochs and after each step but the last of three
    done = list(train(network(), data, config, checkpoint=path, stop=lambda: next(steps) == at))
    state = load_checkpoint(path)
    assert len(done) == (0 if position else 1) and state["random"]["position"] == position
    foreign = torch.arange(16, dtype=torch.uint8)
    state["random"] |= {"data": foreign, "begun": foreign, "cuda": foreign}
    save_checkpoint(path, state)
    lines = list(train(network(seed=5), data, config, checkpoint=path, resume=True))
    assert [line.epoch for line in lines] == [1, 2] and math.isfinite(lines[-1].test_loss)


def test_generators_of_another_kind_draw_what_no_pass_before_has_drawn(data: ImageData) -> None:
    foreign = torch.arange(16, dtype=torch.uint8)
    state = {"data": foreign, "begun": foreign, "position": 1, "passes": 0}
    found = []
    for seed in (0, 1):
        batches = TrainBatches(data, 16, seed=seed)
        batches.set_state(state)
        found.append([labels for _, labels in batches])
    assert len(found[0]) == 2 and all(map(torch.equal, *found))
    first = [labels for _, labels in TrainBatches(data, 16, seed=0)]
    assert not all(map(torch.equal, found[0], first[1:]))


def test_a_stop_after_the_last_step_of_an_epoch_is_heard(tmp_path: Path, data: ImageData) -> None:
    asked = []

    def stop() -> bool:
        asked.append(len(seen))
        return bool(seen)

    seen: list[EpochMetrics] = []
    path = tmp_path / "gated.pt"
    for line in train(network(), data, CONFIG, checkpoint=path, stop=stop):
        seen.append(line)
    assert len(seen) == 1 and asked[-2:] == [0, 1]  # not asked again within the second epoch
    assert load_checkpoint(path)["random"]["position"] == 0


def test_weights_that_break_in_the_last_step_are_noticed(data: ImageData) -> None:
    class FailingInEval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(dataclasses.replace(CONFIG, gate="none"))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits if self.training else logits * math.inf

    with pytest.raises(NonFiniteLoss, match="not finite in the evaluation"):
        list(train(FailingInEval(), data, CONFIG))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, data: ImageData) -> None:
    path = tmp_path / "gated.pt"
    list(itertools.islice(train(network(), data, CONFIG, checkpoint=path), 1))
    other = dataclasses.replace(CONFIG, lr=0.3)
    with pytest.raises(CheckpointError, match=r"gated\.pt: checkpoint of another run: expected lr 0.3, found 0.05"):
        list(train(network(), data, other, checkpoint=path, resume=True))
    with pytest.raises(CheckpointError, match="expected a checkpoint of phase 'dense', found one of 'gated'"):
        list(train(network(), data, CONFIG, phase="dense", checkpoint=path, resume=True))
    with pytest.raises(CheckpointError, match="checkpoint of another model: .*ResNet"):
        list(train(ResNet(14, 3, "layer", input_size=(1, 8, 8)), data, CONFIG, checkpoint=path, resume=True))
    fewer = validation_view(data, 0.5, seed=0)
    with pytest.raises(CheckpointError, match="checkpoint of other data: expected 24 train images"):
        list(train(network(), fewer, CONFIG, checkpoint=path, resume=True))
    swapped = dataclasses.replace(data, train_labels=data.train_labels.flip(0))
    with pytest.raises(CheckpointError, match="its training labels differ"):
        list(train(network(), swapped, CONFIG, checkpoint=path, resume=True))
    assert load_checkpoint(path)["epoch"] == 1


def test_resuming_without_a_checkpoint_is_refused(tmp_path: Path, data: ImageData) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint, found none"):
        list(train(network(), data, CONFIG, checkpoint=tmp_path / "none.pt", resume=True))


def test_a_deadline_that_has_passed_still_leaves_a_step(tmp_path: Path, data: ImageData) -> None:
    """However early it is, a training that is resumed often enough comes to the end of one without it."""
    config, path = dataclasses.replace(CONFIG, epochs=2), tmp_path / "gated.pt"
    straight = network(config)
    whole = list(train(straight, data, config))
    found = []
    for _ in range(6):  # of three steps in each epoch
        model = network(config)
        lines = list(train(model, data, config, checkpoint=path, resume=path.exists(), deadline=0.0))
        found.append((len(lines), load_checkpoint(path)["random"]["position"]))
    assert found == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert comparable(lines) == comparable(whole)
    assert_same_state(straight.state_dict(), model.state_dict())
