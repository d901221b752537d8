"""The paper's presets follow its section 4.1."""

from __future__ import annotations

import pytest

from gatedconv.train.config import make_config
from gatedconv.train.optimizer import learning_rate
from gatedconv.train.recipe import polar_weight
from reproduce.paper_presets import PAPER, paper_settings


def test_every_preset_is_a_valid_config_with_its_own_name() -> None:
    for name in PAPER:
        assert make_config(paper_settings(name)).name == name


@pytest.mark.parametrize(
    ("name", "batch", "drops"),
    [
        ("paper-c10-r110-layer", 256, (60, 120, 160)),
        ("paper-c10-r110-layer-swapped", 256, (125, 190, 250)),
        ("paper-c100-r110-layer", 64, (125, 190, 250)),
        ("paper-c100-r110-layer-swapped", 64, (60, 120, 160)),
    ],
)
def test_paper_presets_follow_section_4_1(name: str, batch: int, drops: tuple[int, ...]) -> None:
    config = make_config(paper_settings(name))
    assert (config.epochs, config.batch_size, config.momentum, config.weight_decay) == (350, batch, 0.9, 5e-4)
    assert (config.nesterov, config.seed, config.shortcut, config.estimator) == (False, 1, "B", "ste")
    rates = [learning_rate(config, epoch) for epoch in range(350)]
    assert rates[0] == 0.1
    changes = [epoch for epoch in range(1, 350) if rates[epoch] != rates[epoch - 1]]
    assert tuple(changes) == drops
    assert [rates[epoch] / rates[epoch - 1] for epoch in changes] == pytest.approx([0.1] * 3)
    lambdas = [polar_weight(config, epoch / 350) for epoch in (0, 124, 125, 189, 190, 349)]
    assert lambdas == [0, 0, 2, 2, 3, 3]


def test_paper_channel_preset_is_2fc_after() -> None:
    config = make_config(paper_settings("paper-c10-r110-channel"))
    assert (config.gate, config.position, config.hidden, config.pool) == ("channel", "after", 16, "flatten")


def test_presets_of_the_package_are_found_too() -> None:
    assert paper_settings("best-c10-r56")["name"] == "best-c10-r56"
    with pytest.raises(ValueError, match="unknown preset"):
        paper_settings("paper-c10-r57-layer")
