"""Training steps captured as CUDA graphs on a GPU: the plain steps, replayed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gatedconv.data.image_data import Augment, ImageData, make_image_data
from gatedconv.gating import find_gates, pruner
from gatedconv.models.resnet import ResNet
from gatedconv.train import TrainConfig
from gatedconv.train.cuda_graph_step import WARM_UP, CudaGraphStepper
from gatedconv.train.metrics import EpochMeter
from gatedconv.train.step import Stepper
from tests.tolerances import assert_close
from tests.train.steps import make_steps, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CONFIG = TrainConfig(
    epochs=4, batch_size=16, lr=0.02, gate="layer", device="cuda", skip_blocks=False, polar_schedule="constant"
)
CASES: dict[str, dict[str, Any]] = {
    "rank": {"gate": "channel", "position": "middle", "mac_control": "rank", "mac_ramp": (0.0, 0.6)},
    "rank-bf16": {
        "gate": "channel",
        "position": "middle",
        "mac_control": "rank",
        "mac_ramp": (0.0, 0.6),
        "amp": "bf16",
    },
    "price": {"gate": "both", "position": "middle", "mac_control": "price", "mac_ramp": (0.2, 0.6)},
    "weights": {"act_weight": 0.1, "mac_weight": 1.0, "gate_warmup": 0.5, "grad_clip": 5.0},
    "flatten": {"gate": "channel", "position": "after", "pool": "flatten"},
    "dense": {"gate": "none", "amp": "bf16"},
    "fp16": {"amp": "fp16"},
    "parts": {"gate": "channel", "position": "middle", "accumulate": 2},
    "compiled": {"gate": "channel", "position": "middle", "compile": True},
}
STEPS = WARM_UP + 8


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Convolutions in fp32, so that two orders of adding differ by rounding alone."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    monkeypatch.setattr(pruner, "EVERY", 2)
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def network(config: TrainConfig) -> ResNet:
    torch.manual_seed(2)
    gate = None if config.gate == "none" else config.gate
    net = ResNet(8, 3, gate, config.position, estimator=config.estimator, pool=config.pool, input_size=(3, 16, 16))
    for gate_ in find_gates(net).values():  # far from where a rounding opens or shuts them
        torch.nn.init.zeros_(gate_.fc2.weight)
    return net.cuda().to(memory_format=torch.channels_last).train()


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    images = torch.randn(16, 3, 16, 16, generator=draw).cuda().contiguous(memory_format=torch.channels_last)
    return images, (torch.arange(16) % 3).cuda()


def trained(kind: type[Stepper], config: TrainConfig) -> tuple[Stepper, EpochMeter]:
    batches = [(*batch(step), None, step / 4) for step in range(STEPS)]
    broken = None if config.amp == "fp16" else WARM_UP + 5
    return make_steps(kind, network(config), config, batches, evaluation=WARM_UP + 3, broken=broken)


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_the_plain_ones(name: str) -> None:
    config = dataclasses.replace(CONFIG, **CASES[name])
    (plain, expected), (captured, found) = trained(Stepper, config), trained(CudaGraphStepper, config)
    assert isinstance(captured, CudaGraphStepper) and captured._replay is not None
    assert int(plain.guard.skipped) == int(captured.guard.skipped) == (config.amp != "fp16")
    assert plain.macs.executed == captured.macs.executed
    # Both round to the same type; the order of sums alone differs, which bf16 forgives as rarely as fp16.
    dtype = torch.float32 if config.amp == "off" else torch.float16
    alike = functools.partial(assert_close, dtype=dtype, algorithm="training")
    alike(found._sums.tolist(), expected._sums.tolist(), scale=1.0)
    alike(dict(captured.model.named_parameters()), dict(plain.model.named_parameters()), scale=0.1)
    if plain.pruner is not None and captured.pruner is not None:
        assert bool(plain.pruner.pruned.any())
        # Squares of gradients of a few batches: the least robust of all.
        assert_close(captured.pruner.sensitivity, plain.pruner.sensitivity, dtype="tf32", algorithm="training")


def test_a_replay_makes_the_host_wait_for_nothing() -> None:
    config = dataclasses.replace(CONFIG, **CASES["weights"])
    stepper, _ = trained(CudaGraphStepper, config)
    images, labels = batch(99)
    torch.cuda.synchronize()
    with stepper.active():
        torch.cuda.set_sync_debug_mode("error")
        try:
            stepper(images, labels, 3.9)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_noise_is_drawn_anew_in_every_replay() -> None:
    config = dataclasses.replace(CONFIG, estimator="bernoulli", lr=1e-6)
    model = network(config)
    gate = next(iter(find_gates(model).values()))
    stepper, rates = CudaGraphStepper(model, config, torch.device("cuda")), []
    images, labels = batch(0)
    with stepper.active():
        for _ in range(WARM_UP + 12):
            stepper(images, labels, 0.5)
            assert gate.open_rate is not None
            rates.append(float(gate.open_rate.mean()))
    assert len(set(rates[WARM_UP:])) > 2


def images() -> ImageData:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (128, 3, 16, 16), dtype=torch.uint8, generator=draw)
    split = pixels, torch.arange(128) % 3
    return make_image_data("noise", split, split, Augment(pad=2, flip=True))


@pytest.mark.parametrize("steps", [16, 21], ids=["after an epoch", "within an epoch"])
@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_a_resumed_run_ends_where_the_straight_one_does(
    captured: bool, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, if the straight run repeats so; a captured step warms up anew, by other algorithms perhaps."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config, data = dataclasses.replace(CONFIG, **CASES["rank"], cuda_graph=captured), images()
    straight, again, resumed = network(config), network(config), network(config)
    whole = list(train(straight, data, config))
    list(train(again, data, config))
    asked, path = (
        itertools.count(),
        tmp_path / "interrupted.pt",
    )  # asked before an epoch, then after each of its 8 steps
    interrupted = list(
        train(network(config), data, config, checkpoint=path, stop=lambda: next(asked) == steps + steps // 8)
    )
    assert len(interrupted) == steps // 8
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()  # all of it comes from the checkpoint
    joined = list(train(resumed, data, config, checkpoint=path, resume=True))
    assert [line.epoch for line in joined] == [1, 2, 3, 4]
    assert joined[-1].train_macs == whole[-1].train_macs
    states = [model.state_dict() for model in (straight, again, resumed)]
    repeats = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    if repeats and not captured:
        assert all(torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert_close(states[2], states[0], algorithm="training", scale=0.1)
    assert not torch.backends.cudnn.benchmark
