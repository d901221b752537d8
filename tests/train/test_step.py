"""Ways to train faster or in less memory: each computes what the plain way computes."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.data import ImageData
from gatedconv.gating import GatePruner, forget, pruner
from gatedconv.gating.losses import RateWindow, accumulating, global_open_rates
from gatedconv.models.resnet import ResNet
from gatedconv.nn import BasicBlock
from gatedconv.train import TrainConfig
from gatedconv.train.distributed import SINGLE
from gatedconv.train.metrics import EpochMeter
from gatedconv.train.recompute import recomputing
from gatedconv.train.step import StepGuard, Stepper
from tests.tolerances import assert_close, in_decimals, near
from tests.train.steps import set_predict_skips, train
from tests.train.total_loss import total_loss

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    epochs=2,
    batch_size=8,
    lr=0.05,
    gate="layer",
    mac_weight=1.0,
    act_weight=0.1,
    polar_schedule="constant",
    device="cpu",
    channels_last=False,
)
IMAGES, LABELS = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def network(gate: str = "layer", position: str = "after", depth: int = 8, **options: Any) -> ResNet:
    torch.manual_seed(2)
    return ResNet(depth, 3, gate, position, input_size=(1, 8, 8), **options).train()


def still(model: nn.Module) -> nn.Module:
    """BatchNorm in eval: the statistics of a part of a batch are others than the whole's."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def stepped(model: ResNet, steps: int = 3, **changes: Any) -> dict[str, torch.Tensor]:
    stepper = Stepper(model, dataclasses.replace(CONFIG, **changes), CPU)
    with stepper.active():
        for number in range(steps):
            stepper(IMAGES, LABELS, 0.3 + number / 10)
    return model.state_dict()


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name, value in right.items() if not torch.equal(left[name], value)]


@pytest.mark.parametrize(("gate", "position", "watched"), [("layer", "after", False), ("both", "middle", True)])
def test_a_compiled_network_is_one_graph_and_trains_the_same(gate: str, position: str, watched: bool) -> None:
    torch._dynamo.reset()
    eager, compiled = network(gate, position), network(gate, position)
    pruners = [GatePruner(model) for model in (eager, compiled) if watched]
    whole = torch.compile(compiled, fullgraph=True, backend="aot_eager")  # raises if it takes more than one graph
    for model, called in ((eager, eager), (compiled, whole)):
        loss, _ = total_loss(model, called(IMAGES), LABELS, CONFIG, 0.5)
        loss.backward()
    assert_close(compiled.state_dict(), eager.state_dict())
    for (name, ours), (_, expected) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert expected.grad is not None and ours.grad is not None, name
        assert_close(ours.grad, expected.grad, algorithm="gradient", name=name)
    if watched:
        expected, found = (each.sensitivity for each in pruners)
        assert (expected > 0).all()
        assert_close(found, expected, algorithm="gradient")
    torch._dynamo.reset()


def test_a_compiled_training_closes_the_gates_that_a_plain_one_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(pruner, "EVERY", 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = dataclasses.replace(
        CONFIG, gate="channel", mac_weight=0.0, mac_control="rank", mac_ramp=(0.0, 0.3), accumulate=2
    )
    pruners, states = [], []
    for whole in (False, True):
        stepper = Stepper(network("channel", "middle"), dataclasses.replace(config, compile=whole), CPU)
        with stepper.active():
            for number in range(4):
                stepper(IMAGES, LABELS, 0.3 + number / 10)
        assert stepper.pruner is not None
        pruners.append(stepper.pruner)
        states.append(stepper.model.state_dict())
    plain, compiled = pruners
    assert 0 < int(plain.pruned.sum()) < len(plain.pruned) and torch.equal(plain.pruned, compiled.pruned)
    assert_close(compiled.sensitivity, plain.sensitivity, algorithm="training")
    assert_close(states[1], states[0], algorithm="training")
    torch._dynamo.reset()


@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
@pytest.mark.parametrize("estimator", ["ste", "bernoulli"])
def test_recomputed_blocks_train_the_same_network(gate: str, estimator: str) -> None:
    """Buffers and random numbers too: the second pass leaves no trace."""
    plain = stepped(network(gate, "middle", estimator=estimator))
    after_plain = torch.rand(1)
    recomputed = stepped(network(gate, "middle", estimator=estimator), recompute=True)
    assert torch.equal(torch.rand(1), after_plain)
    assert_equal(recomputed, plain)


def test_recomputing_keeps_less_and_runs_each_block_twice() -> None:
    model, kept = network(depth=14), []
    calls: list[str] = []
    model.layer1[0].conv1.register_forward_hook(lambda *args: calls.append("conv1"))
    for again in (False, True):
        calls.clear()
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if again:
                with recomputing(model):
                    loss = model(IMAGES).sum()
                    kept.append(sum(sizes))
                    loss.backward()
            else:
                loss = model(IMAGES).sum()
                kept.append(sum(sizes))
                loss.backward()
        assert len(calls) == 1 + again
    assert kept[1] < kept[0] / 2
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="recompute: expected a network of residual blocks, got Linear"):
        with recomputing(nn.Linear(1, 1)):
            pass


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_task_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    changes = {"polar_weight": 0.0, "mac_weight": 0.0, "act_weight": 0.0, "accumulate": parts}
    config = {**changes, "batch_size": 16}
    left = stepped(still(network()), steps=1, **config)  # type: ignore[arg-type]
    right = stepped(still(network()), steps=1, **{**config, "accumulate": 1})  # type: ignore[arg-type]
    names = [name for name, _ in network().named_parameters()]
    assert_close({n: left[n] for n in names}, {n: right[n] for n in names}, algorithm="gradient")


def test_losses_see_open_rates_over_the_parts_and_move_the_current_one() -> None:
    """Value: the mean of the last parts; gradient: 1 / parts of the current one's."""
    model, seen = network(), []
    with accumulating(model, RateWindow(model, 3)):
        for part in range(5):
            model(IMAGES.roll(part, 1) * (part + 1))
            own = {name: gate.open_rate for name, gate in gatedconv.gates(model).items()}
            seen.append(own)
            joined = global_open_rates(model, "test")
            again = global_open_rates(model, "test")  # does not count the batch twice
            assert all(again[name] is rate for name, rate in joined.items())
            for name, rate in joined.items():
                expected = torch.stack([before[name].detach() for before in seen[-3:]]).mean(dim=0)
                torch.testing.assert_close(rate.detach(), expected)
                (slope,) = torch.autograd.grad(rate.sum(), own[name], retain_graph=True)
                torch.testing.assert_close(slope, torch.full_like(slope, 1 / 3))
    assert global_open_rates(model, "test")[name] is own[name]


def test_a_network_that_forgets_drops_what_the_losses_made_of_its_rates() -> None:
    """Else the graph of a step would live through the next forward pass."""
    model = network()
    with accumulating(model, RateWindow(model, 2)):
        model(IMAGES)
        rates = [weakref.ref(rate) for rate in global_open_rates(model, "test").values()]
        assert all(rate() is not None for rate in rates)
        forget(model)
        gc.collect()
        assert all(rate() is None for rate in rates)


def test_a_step_that_is_done_again_or_undone_counts_once_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step redone because a gate opened, and one whose loss is NaN, leave the window of a step made once."""
    windows = []
    for predict in (False, True):
        model = network(depth=20)
        gate, *others = gatedconv.gates(model).values()
        for other in others:  # whose rates differ from part to part
            nn.init.normal_(other.fc2.weight)
        set_predict_skips(monkeypatch, predict)
        stepper = Stepper(model, dataclasses.replace(CONFIG, accumulate=4), CPU)
        with stepper.active():
            for bias in (-20.0, 0.5):
                nn.init.constant_(gate.fc2.bias, bias)
                stepper(IMAGES, LABELS, 0.3)
            assert stepper.skipping.repeated == predict and stepper.window is not None
            before = stepper.window.before.clone()
            assert not torch.equal(before[0], before[1])
            assert bool(stepper(IMAGES * math.nan, LABELS, 0.3).bad)
            assert torch.equal(stepper.window.before, before)
        windows.append(before)
    assert torch.equal(*windows)


def test_the_logits_of_all_parts_outlive_a_graph_that_writes_over_them() -> None:
    """A CUDA graph gives the same memory for every part."""

    class Replayed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.out = inner, torch.zeros(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.out.data.fill_(math.nan)
            self.out = self.inner(x)
            return self.out

    stepper = Stepper(still(network()), dataclasses.replace(CONFIG, accumulate=4), CPU)
    expected = stepper.model(IMAGES).detach()
    stepper.network = Replayed(stepper.model)
    with stepper.active():
        assert_close(stepper(IMAGES, LABELS, 0.3).logits, expected)


def test_metrics_of_an_accumulated_step_have_the_open_rates_of_all_parts() -> None:
    model, parts = network(), []
    for gate in gatedconv.gates(model).values():
        nn.init.normal_(gate.fc2.weight, std=10.0)
    meter = EpochMeter(model)
    config = dataclasses.replace(CONFIG, accumulate=3)  # parts of 3, 3 and 2 images
    stepper = Stepper(
        model,
        config,
        CPU,
        observe=lambda result, labels: meter.add(
            result.logits, labels, result.loss, result.polarization, result.open_rates, result.bad
        ),
    )
    first = next(iter(gatedconv.gates(model).values()))
    first.register_forward_hook(lambda gate, inputs, opened: parts.append(opened.detach()))
    with stepper.active():
        stepper(IMAGES * torch.arange(8).view(8, 1, 1, 1), LABELS, 0.3)
    assert len({float(part.mean()) for part in parts}) > 1
    found = meter.gate_metrics(SINGLE)["gate_open_rates"]
    assert next(iter(found.values())) == in_decimals(float(torch.cat(parts).mean()), 5)


def test_a_second_bad_step_restores_the_statistics_of_the_steps_between() -> None:
    """Where steps are checked now and then only."""
    norm = nn.BatchNorm1d(1)
    assert norm.running_mean is not None
    guard = StepGuard(norm, CPU)
    for good in (0.0, 5.0):
        norm.running_mean.fill_(good)
        guard.count(torch.tensor(False))
        assert not guard.repair()
        norm.running_mean.fill_(math.nan)
        guard.count(torch.tensor(True))
        assert not guard.repair()
        assert norm.running_mean.item() == good
    assert int(guard.skipped) == 2


def test_accumulation_trains(data: ImageData) -> None:
    lines = list(train(network(), data, dataclasses.replace(CONFIG, epochs=8, batch_size=16, accumulate=3)))
    assert lines[-1].train_loss < lines[0].train_loss and lines[-1].num_gates == 3


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_stays_near_full_precision(data: ImageData, amp: str) -> None:
    config = dataclasses.replace(CONFIG, epochs=3, batch_size=16, lr=0.02)
    exact, mixed = (list(train(network(), data, dataclasses.replace(config, amp=a)))[-1] for a in ("off", amp))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert mixed.train_loss == near(exact.train_loss, dtype, "training") and mixed.steps_skipped == 0


def test_fp16_finds_its_scale_and_survives_a_first_step_that_overflows() -> None:
    model = network()
    stepper = Stepper(model, dataclasses.replace(CONFIG, amp="fp16", skip_blocks=False), CPU)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with stepper.active():
        stepper(IMAGES, LABELS, 0.3)
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        for _ in range(25):
            stepper(IMAGES, LABELS, 0.3)
    assert int(stepper.guard.skipped) == 0 and stepper.scaler.get_scale() < 2.0**24
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.fc.weight, before["fc.weight"])


def test_fp16_counts_a_gradient_that_no_lower_scale_mends() -> None:
    """The loss stays finite; the scaler tries lower scales first, and these tries are its own business."""
    model = network()
    stepper = Stepper(model, dataclasses.replace(CONFIG, amp="fp16"), CPU)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model.fc.weight.register_hook(lambda grad: grad * math.nan)
    before = model.conv1.weight.detach().clone()
    with stepper.active():
        bad = [bool(stepper(IMAGES, LABELS, 0.3).bad) for _ in range(6)]
    assert bad == [False, False, True, True, True, True]  # at scales 4, 2, then 1 and below
    assert stepper.guard.repair() == "4 steps in a row"
    assert torch.equal(model.conv1.weight, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True, "recompute": True}, "compile: cannot be combined with recompute"),
        ({"cuda_graph": True, "recompute": True}, "cuda_graph: cannot be combined with recompute"),
        ({"cuda_graph": True, "device": "cpu"}, "cuda_graph: expected a GPU, got device 'cpu'"),
        ({"accumulate": 5, "batch_size": 9}, "batch_size: expected at least 2 images for each of the 5 parts"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_blocks_are_left_alone_after_a_run(data: ImageData) -> None:
    model = network()
    list(train(model, data, dataclasses.replace(CONFIG, epochs=1, recompute=True)))
    assert all(m.skip is None and "forward" not in vars(m) for m in model.modules() if isinstance(m, BasicBlock))
