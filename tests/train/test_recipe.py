"""What a recipe makes of a config: batches, groups of the optimizer, the loss, the device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from gatedconv.data import ImageData
from gatedconv.gating import find_gates
from gatedconv.models import cifar_vgg
from gatedconv.train import TrainConfig, device, recipe
from gatedconv.train.device import mixed_dtype, precision_note, resolve_device
from gatedconv.train.distributed import Ranks
from gatedconv.train.optimizer import learning_rate, make_optimizer
from gatedconv.train.recipe import train_batches
from tests.tolerances import near
from tests.train.test_loop import CONFIG, network
from tests.train.total_loss import total_loss


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_of_a_share_that_are_too_small_are_refused_on_every_process(data: ImageData, rank: int) -> None:
    ranks = Ranks(rank, 2, rank)
    config = dataclasses.replace(CONFIG, batch_size=7, accumulate=2)  # 3 and 4 images: a part of one
    with pytest.raises(ValueError, match="batch_size: expected at least 8, .* 2 parts .* 2 processes, got 7"):
        train_batches(config, data, ranks=ranks)
    batches = train_batches(dataclasses.replace(config, batch_size=8), data, ranks=ranks)
    images, _ = next(iter(batches))
    assert [len(part) for part in images.tensor_split(2)] == [2, 2]


def test_optimizer_groups_decay_what_they_should() -> None:
    config = TrainConfig(weight_decay=0.01, norm_weight_decay=False, gate_lr_factor=0.5)
    model = network()
    optimizer = make_optimizer(model, config)
    groups = {id(p): (g["weight_decay"], g["lr_factor"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if "gate" in name:
            assert groups[id(parameter)] == (0.0, 0.5), name
        elif "bn" in name or "downsample.1" in name or name == "fc.bias":
            assert groups[id(parameter)] == (0.0, 1.0), name
        else:
            assert groups[id(parameter)] == (0.01, 1.0), name


def test_total_loss_is_the_sum_of_its_parts() -> None:
    """Against the equations, written out on the open rates."""
    config = TrainConfig(
        polar_weight=2.0, polar_schedule="constant", act_weight=0.5, mac_weight=3.0, mac_target=0.5, gate_warmup=0.5
    )
    model = network().train()
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 3
    logits = model(images)
    loss, polarization = total_loss(model, logits, labels, config, progress=0.25)
    rates = [gate.open_rate.item() for gate in find_gates(model).values()]
    polar = sum(rate * (1 - rate) for rate in rates) / 3
    dense = sum(term.macs for term in model.mac_terms)
    macs = sum(
        term.macs * math.prod(find_gates(model)[name].open_rate.item() for name in term.gates)
        for term in model.mac_terms
    )
    entropy = -logits.log_softmax(1)[torch.arange(16), labels].mean().item()
    expected = entropy + 2 * polar + 0.5 * (0.5 * sum(rates) / 3 + 3 * (macs / (0.5 * dense) - 1) ** 2)
    assert polarization.item() == near(polar, terms=16, scale=0.25)
    assert loss.item() == near(expected)


@pytest.mark.parametrize("warmup", [0.005, 0.01, 0.5])
def test_a_warm_up_never_exceeds_the_learning_rate(warmup: float) -> None:
    config = TrainConfig(lr=0.1, epochs=4, warmup_epochs=warmup)
    rates = [learning_rate(config, step / 200) for step in range(200)]
    assert 0 < rates[0] <= max(rates) <= 0.1


@pytest.mark.parametrize(
    ("flags", "native"), [("sse4_2 avx2 fma", False), ("avx2 avx512f avx512_bf16", True), ("avx2 amx_bf16", True)]
)
def test_bf16_on_cpus_with_and_without_its_instructions(
    flags: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cpu_info", lambda field: flags)
    cpu = torch.device("cpu")
    assert mixed_dtype("auto", cpu) == (torch.bfloat16 if native else None)
    assert (mixed_dtype("bf16", cpu), mixed_dtype("off", cpu)) == (torch.bfloat16, None)
    assert not precision_note("auto", cpu) and not precision_note("off", cpu)
    assert native == (precision_note("bf16", cpu) == "")
    assert native or "this CPU has no bf16 instructions" in precision_note("bf16", cpu)


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device: expected one that this machine has"):
        resolve_device("cuda:99")


def test_norm_biases_learn_fast_and_decay_as_before() -> None:
    model = cifar_vgg(10, "channel", widths=(8, 8, 8))
    optimizer = make_optimizer(model, TrainConfig(norm_bias_lr_factor=64.0, weight_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    bias = groups["group2.norm1.bias"]
    assert (bias["lr_factor"], bias["weight_decay"] * bias["lr_factor"]) == (64.0, 0.5)
    assert groups["group1.channel_gate.norm.bias"]["lr_factor"] == groups["whiten.bias"]["lr_factor"] == 1.0
    assert "whiten.weight" not in groups and "group1.norm1.weight" not in groups  # they do not learn


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({}, True),
        ({"polar_weight": 5.0}, True),
        ({"mac_weight": 1.0}, False),
        ({"act_weight": 0.1}, False),
        ({"mac_control": "rank", "consensus_at": 0.5}, False),
        ({"gate": "none"}, False),
    ],
)
def test_a_run_in_which_nothing_aims_at_fewer_macs_is_noted(changes: dict[str, Any], noted: bool) -> None:
    note = recipe.closing_note(TrainConfig(**changes))
    assert ("nothing aims at fewer MACs" in note) == noted == bool(note)
