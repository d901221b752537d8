from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gatedconv.train import PRESETS, TrainConfig, preset_settings
from gatedconv.train.config import field_specs, make_config, read_toml, to_toml
from gatedconv.train.optimizer import learning_rate
from gatedconv.train.recipe import polar_weight


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("epochs", 0, ValueError, "epochs: expected at least 1, got 0"),
        ("epochs", 2.5, TypeError, "epochs: expected a whole number, got 2.5"),
        ("epochs", True, TypeError, "epochs: expected a whole number, got True"),
        ("batch_size", 1, ValueError, "batch_size: expected at least 2, got 1"),
        ("lr", 0.0, ValueError, "lr: expected above 0.0, got 0.0"),
        ("lr", float("nan"), ValueError, "lr: expected above 0.0, got nan"),
        ("lr", float("inf"), ValueError, "lr: expected above 0.0, got inf"),
        ("momentum", 1.5, ValueError, "momentum: expected at least 0.0 and at most 1.0, got 1.5"),
        ("mac_target", 0.0, ValueError, "mac_target: expected above 0.0 and at most 1.0, got 0.0"),
        ("mac_ramp_power", 0.0, ValueError, "mac_ramp_power: expected above 0.0 and at most 10.0, got 0.0"),
        ("mac_rank", "some", ValueError, "mac_rank: expected one of all, each, got 'some'"),
        ("mac_rank", "each", ValueError, "mac_rank: expected 'all', a layer gate is alone in its layer; got 'each'"),
        ("model", "resnet21", ValueError, "model: expected one of resnet20, .*got 'resnet21'"),
        ("gate", "blocks", ValueError, "gate: expected one of none, layer, channel, both, got 'blocks'"),
        ("nesterov", "yes", TypeError, "nesterov: expected bool, got 'yes'"),
        ("milestones", (0.7, 0.3), ValueError, "milestones: expected rising fractions"),
        ("milestones", (0.5, 1.5), ValueError, "milestones: expected above 0.0 and at most 1.0, got 1.5"),
        ("milestones", 0.5, TypeError, "milestones: expected a list of numbers, got 0.5"),
        ("lr", 10**400, ValueError, "lr: expected above 0.0, got 1000"),
        ("epochs", 10**400, ValueError, "epochs: expected at least 1, got 1000"),
        ("device", "cuda:99999999999", ValueError, "device: expected auto, cpu, cuda or cuda:N"),
        ("device", "cuda:²", ValueError, "device: expected auto, cpu, cuda or cuda:N"),
        ("device", "tpu", ValueError, "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_each_fault_names_field_range_and_value(field: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**{field: value})


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov: expected momentum above 0"):
        TrainConfig(momentum=0.0)


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="run.toml: unknown field 'batchsize'; did you mean batch_size?"):
        make_config({"batchsize": 3}, where="run.toml")


def test_every_field_has_help() -> None:
    assert all(spec.metadata["help"] for spec in field_specs().values())


@pytest.mark.parametrize("name", ["demo", "best-c100-r110", "best-c10-r56"])
def test_toml_gives_the_same_config_back(name: str, tmp_path: Path) -> None:
    config = make_config(preset_settings(name))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert make_config(read_toml(tmp_path / "config.toml")) == config


def test_toml_faults_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: expected a TOML file, found nothing"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(ValueError, match=r"bad\.toml: expected a TOML file, could not read it"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "table.toml").write_text("[train]\nepochs = 3")
    with pytest.raises(ValueError, match=r"found the table \[train\]"):
        read_toml(tmp_path / "table.toml")


def test_every_preset_is_a_valid_config_with_its_own_name() -> None:
    for name in PRESETS:
        assert make_config(preset_settings(name)).name == name


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown preset 'best-c10-r57'; did you mean best-c10-r56"):
        preset_settings("best-c10-r57")


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_the_best_presets_share_one_recipe(depth: int) -> None:
    """Every depth has the teacher; presets differ in name, network and images alone."""
    recipe = preset_settings(f"best-c10-r{depth}")
    assert recipe["teacher_at"] == 0.2
    own = {"name": "best-c100-r56", "data": "cifar100", "model": "resnet56"}
    assert recipe | own == preset_settings("best-c100-r56")


def test_cosine_with_warmup() -> None:
    config = TrainConfig(epochs=10, lr=1.0, warmup_epochs=2.0)
    assert learning_rate(config, 0.0) > 0
    assert learning_rate(config, 1.0) == 0.5
    assert learning_rate(config, 2.0) == 1.0
    assert learning_rate(config, 6.0) == pytest.approx(0.5)
    assert learning_rate(config, 10.0) == pytest.approx(0.0)


def test_polar_weight_schedules() -> None:
    rising = TrainConfig(polar_weight=6.0)
    assert [polar_weight(rising, progress) for progress in (0.1, 0.4, 0.9)] == [0.0, 4.0, 6.0]
    constant = dataclasses.replace(rising, polar_schedule="constant")
    assert polar_weight(constant, 0.0) == 6.0
    warmup = dataclasses.replace(rising, polar_schedule="warmup", gate_warmup=0.5)
    assert [polar_weight(warmup, progress) for progress in (0.0, 0.25, 0.5, 1.0)] == [0.0, 3.0, 6.0, 6.0]


def test_triangular_falls_in_a_line_to_what_is_left_of_it() -> None:
    config = TrainConfig(epochs=10, lr=1.0, warmup_epochs=2.0, schedule="triangular", lr_end=0.1)
    rates = [learning_rate(config, epoch) for epoch in (1.0, 2.0, 6.0, 10.0)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "gate: expected 'channel' for model 'cifar_vgg', got 'layer'"),
        ({"gate": "channel"}, "position: expected 'middle'"),
        ({"gate": "channel", "position": "middle", "pool": "flatten"}, "pool: expected 'avg'"),
        ({"gate": "none", "recompute": True}, "recompute: expected a network of residual blocks"),
    ],
)
def test_the_fast_network_has_one_place_for_gates(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(model="cifar_vgg", **fields)


def test_the_fast_preset_trains_less_than_its_minutes_allow() -> None:
    """45 minutes of two AVX2 cores, 150 GFLOP/s, are 4e14 FLOPs; training takes at most 3/4 of them."""
    config = make_config(preset_settings("fast-c10"))
    macs = 118.3e6 * 3 * 50_000 * config.epochs
    share = config.consensus_at + (1 - config.consensus_at) * config.mac_target
    assert 2 * macs * share < 0.75 * 150e9 * 60 * 45
