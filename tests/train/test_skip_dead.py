"""Blocks that are left out change nothing that is learned, and what they save is counted."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.data import ImageData
from gatedconv.models.resnet import ResNet
from gatedconv.nn import BasicBlock
from gatedconv.train import TrainConfig
from gatedconv.train.skip_dead import PASSES_PER_STEP
from gatedconv.train.step import Stepper
from tests.tolerances import assert_close
from tests.train.steps import set_predict_skips, train
from tests.train.total_loss import total_loss

CONFIG = TrainConfig(
    epochs=4,
    batch_size=8,
    lr=0.05,
    warmup_epochs=0.0,
    mac_weight=1.0,
    act_weight=0.1,
    weight_decay=0.01,
    gate_weight_decay=0.01,
    gate="layer",
    device="cpu",
    channels_last=False,
)
CPU = torch.device("cpu")


def network(shut: tuple[int, ...], logit: float = -20.0) -> ResNet:
    """Ten blocks less one; the layer gates of those in `shut` start at a logit."""
    torch.manual_seed(3)
    model = ResNet(20, 3, "layer", input_size=(1, 8, 8))
    for number, gate in enumerate(gatedconv.gates(model).values()):
        if number in shut:
            nn.init.constant_(gate.fc2.bias, logit)
    return model.train()


def steps(model: ResNet, config: TrainConfig, count: int = 6) -> Stepper:
    stepper = Stepper(model, config, CPU)
    generator = torch.Generator().manual_seed(1)
    with stepper.active():
        for number in range(count):
            x = torch.randn(8, 1, 8, 8, generator=generator)
            stepper(x, torch.arange(8) % 3, number / count)
    return stepper


def plain_steps(model: ResNet, config: TrainConfig, count: int = 6) -> None:
    """The same steps in PyTorch's own words, with nothing left out."""
    gates = {id(p) for gate in gatedconv.gates(model).values() for p in gate.parameters()}
    kinds: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "gates": []}
    for p in model.parameters():
        kinds["gates" if id(p) in gates else "weights" if p.dim() > 1 else "norms"].append(p)
    decay = {"weights": config.weight_decay, "norms": config.weight_decay, "gates": config.gate_weight_decay}
    optimizer = torch.optim.SGD(
        [{"params": found, "weight_decay": decay[kind]} for kind, found in kinds.items()],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        x = torch.randn(8, 1, 8, 8, generator=generator)
        loss, _ = total_loss(model, model(x), torch.arange(8) % 3, config, number / count / config.epochs)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * number / count / config.epochs))
        optimizer.step()


@pytest.mark.parametrize("predict", [False, True], ids=["now", "predicted"])
@pytest.mark.parametrize("shut", [(), (1, 4, 5, 8), (0, 3, 6), tuple(range(9))], ids=["none", "some", "strided", "all"])
def test_weights_are_those_without_leaving_out(
    predict: bool, shut: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum and weight decay of what is left out included; only its BatchNorm statistics stand still."""
    set_predict_skips(monkeypatch, predict)
    left_out, whole = network(shut), network(shut)
    stepper = steps(left_out, CONFIG)
    plain_steps(whole, CONFIG)
    still = [f"{name}.{norm}" for i, (name, _) in enumerate(blocks(whole)) for norm in ("bn1", "bn2") if i in shut]
    for name, value in whole.state_dict().items():
        norm, _, kind = name.rpartition(".")
        if norm in still and kind in ("running_mean", "running_var", "num_batches_tracked"):
            continue
        assert_close(left_out.state_dict()[name], value, name=name)
    made = 5 if predict else 6  # the first step has none before it
    for norm in still:
        assert int(left_out.get_submodule(norm).num_batches_tracked) == 6 - made
    costs = [sum(t.macs for t in whole.mac_terms if f"{name}.layer_gate" in t.gates) for name, _ in blocks(whole)]
    assert stepper.macs.saved == pytest.approx(PASSES_PER_STEP * made * 8 * sum(costs[i] for i in shut))


def blocks(model: nn.Module) -> list[tuple[str, BasicBlock]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BasicBlock)]


def test_a_block_left_out_runs_no_convolution() -> None:
    model, ran = network((2, 7)), []
    for name, block in blocks(model):
        block.conv1.register_forward_hook(lambda *args, name=name: ran.append(name))
    steps(model, CONFIG, count=1)
    names = [name for name, _ in blocks(model)]
    assert ran == [name for number, name in enumerate(names) if number not in (2, 7)]


@pytest.mark.parametrize("predict", [False, True], ids=["now", "predicted"])
def test_a_gate_that_opens_again_is_noticed_in_the_same_step(predict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate whose logits move with the batch, in and out of the window: the step is never wrong."""
    set_predict_skips(monkeypatch, predict)
    outcomes = []
    for skip in (True, False):
        model = network(())
        stepper = Stepper(model, dataclasses.replace(CONFIG, skip_blocks=skip), CPU)
        gates = list(gatedconv.gates(model).values())
        with stepper.active():
            for number in range(8):
                for place, gate in enumerate(gates):
                    nn.init.constant_(gate.fc2.bias, -20.0 if (number // 2 + place) % 2 else 0.5)
                x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(number))
                stepper(x, torch.arange(8) % 3, 0.1)
        outcomes.append((model.state_dict(), stepper))
    (left_out, skipper), (whole, _) = outcomes
    assert skipper.macs.saved > 0 and (skipper.skipping.repeated > 0) == predict
    for name, value in whole.items():
        if "running" not in name and "num_batches" not in name:
            assert_close(left_out[name], value, name=name)


@pytest.mark.parametrize("change", [{"estimator": "gumbel"}, {"estimator": "batch_mean"}])
def test_gates_without_a_window_are_never_left_out(change: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = ResNet(20, 3, "layer", input_size=(1, 8, 8), **change).train()
    for gate in gatedconv.gates(model).values():
        nn.init.constant_(gate.fc2.bias, -20.0)
    assert steps(model, CONFIG, count=2).macs.saved == 0


def test_blocks_with_a_channel_gate_inside_are_not_left_out() -> None:
    """Its own losses still move it while the block is shut."""
    torch.manual_seed(0)
    model = ResNet(20, 3, "both", "middle", input_size=(1, 8, 8)).train()
    inner = gatedconv.gates(model)["layer1.0.channel_gate"]
    nn.init.constant_(gatedconv.gates(model)["layer1.0.layer_gate"].fc2.bias, -20.0)
    before = inner.fc2.bias.detach().clone()
    assert steps(model, CONFIG, count=2).macs.saved == 0
    assert not torch.equal(inner.fc2.bias, before)


def test_what_was_executed_is_in_the_metrics(data: ImageData) -> None:
    model = network((0, 1, 2))
    (line,) = train(model, data, dataclasses.replace(CONFIG, epochs=1, batch_size=16))
    whole = PASSES_PER_STEP * 48 * sum(term.macs for term in model.mac_terms)
    shut = {f"layer1.{number}.layer_gate" for number in range(3)}
    saved = PASSES_PER_STEP * 48 * sum(term.macs for term in model.mac_terms if shut & set(term.gates))
    assert line.train_macs == pytest.approx(whole - saved) and line.macs_saved == pytest.approx(saved / whole)
    assert all(block.skip is None for _, block in blocks(model))
    assert copy.deepcopy(model) is not model


def test_a_step_that_is_made_again_is_executed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first try left out one block, and was of no use."""
    set_predict_skips(monkeypatch, True)
    model = network((4,))
    total = sum(term.macs for term in model.mac_terms)
    cost = sum(term.macs for term in model.mac_terms if "layer2.1.layer_gate" in term.gates)
    stepper = Stepper(model, CONFIG, CPU)
    with stepper.active():
        stepper(torch.randn(8, 1, 8, 8), torch.arange(8) % 3, 0.1)
        nn.init.constant_(gatedconv.gates(model)["layer2.1.layer_gate"].fc2.bias, 0.5)
        stepper(torch.randn(8, 1, 8, 8), torch.arange(8) % 3, 0.2)
    assert stepper.skipping.repeated == 1 and stepper.macs.saved == 0
    assert stepper.macs.executed == pytest.approx(PASSES_PER_STEP * 8 * (3 * total - cost))


@pytest.mark.parametrize("shut", [(), (1, 2)])
def test_blocks_that_are_computed_again_are_counted_again(shut: tuple[int, ...]) -> None:
    """All but the first convolution with its norm, the pool and the last layer: written out for 8x8 images."""
    model = network(shut)
    total = sum(term.macs for term in model.mac_terms)
    cost = sum(t.macs for t in model.mac_terms if set(t.gates) & {f"layer1.{number}.layer_gate" for number in shut})
    outside = 16 * 9 * 64 + 2 * 16 * 64 + 64 * 2 * 2 + 64 * 3
    stepper = steps(model, dataclasses.replace(CONFIG, recompute=True), count=2)
    once = PASSES_PER_STEP * (total - cost) + (total - outside - cost)
    assert stepper.macs.executed == pytest.approx(2 * 8 * once)


def test_a_gate_whose_gradient_is_needed_is_skipped_only_once_it_is_closed_for_good() -> None:
    model = network((1, 2))
    gates = list(gatedconv.gates(model).values())
    for gate in gates[1:3]:
        gate.needs_gradient = True
    nn.init.zeros_(gates[2].fc2.weight)
    stepper = steps(model, CONFIG, count=1)
    cost = sum(term.macs for term in model.mac_terms if "layer1.2.layer_gate" in term.gates)
    assert stepper.macs.saved == pytest.approx(PASSES_PER_STEP * 8 * cost)


def test_a_hook_on_a_gate_does_not_switch_skipping_off() -> None:
    model = network((1, 2))
    calls: list[nn.Module] = []
    for gate in gatedconv.gates(model).values():
        gate.register_forward_hook(lambda gate, *args: calls.append(gate))
    stepper = steps(model, CONFIG, count=1)
    closed = {"layer1.1.layer_gate", "layer1.2.layer_gate"}
    cost = sum(term.macs for term in model.mac_terms if closed & set(term.gates))
    assert stepper.macs.saved == pytest.approx(PASSES_PER_STEP * 8 * cost) and len(calls) == 9
