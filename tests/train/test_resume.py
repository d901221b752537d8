"""A run that is stopped anywhere and resumed ends with the bits of one that was not, whatever has a state."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gatedconv import models
from gatedconv.data import ImageData
from gatedconv.gating import pruner
from gatedconv.models import cifar_vgg
from gatedconv.train import Callback, RunFolder, TrainConfig, run
from gatedconv.train.callbacks import StepReport
from gatedconv.train.checkpoint import has_checkpoint, load_checkpoint
from gatedconv.train.stopping import StopRequest
from gatedconv.train.trainer import Trainer
from tests.image_files import blobs, write_npz
from tests.train.kills import differences

_LATE = {
    "gate": "channel",
    "position": "middle",
    "mac_control": "rank",
    "mac_ramp": (0.25, 0.4),
    "consensus_at": 0.5,
    "teacher_at": 0.25,
    "polar_schedule": "constant",
}
RECIPES: dict[str, dict[str, Any]] = {
    "dense": {"gate": "none"},
    "layer gates, a weight on the MACs": {"gate": "layer", "mac_weight": 4.0},
    "noise": {"gate": "both", "estimator": "gumbel", "mac_weight": 4.0},
    "running means of logits": {"gate": "layer", "estimator": "batch_mean"},
    "a price on the MACs": {
        "gate": "channel",
        "position": "middle",
        "mac_control": "price",
        "consensus_at": 0.5,
        "consensus_by": "logit",
    },
    "ranks, consensus, teacher": _LATE,
    "the fast network": {
        **_LATE,
        "model": "cifar_vgg",
        "lookahead": 0.77,
        "flip": "alternating",
        "schedule": "triangular",
        "norm_bias_lr_factor": 64.0,
        "amp": "bf16",
    },
}
# (epoch, step) of the stops: where the teacher begins, at the last step before the consensus, after it, and at the end.
STOPS = [(1, 2), (2, 1), (2, 3), (3, 2), (4, 3)]


@pytest.fixture
def archives(tmp_path: Path, data: ImageData) -> dict[str, Path]:
    images, labels = blobs(48, channels=3, side=26)
    splits = {"train_images": images, "train_labels": labels, "test_images": images[:8], "test_labels": labels[:8]}
    return {"resnet20": tmp_path / "blobs.npz", "cifar_vgg": write_npz(tmp_path / "large.npz", **splits)}


def trained(config: TrainConfig, path: Path, stops: list[tuple[int, int]]) -> RunFolder:
    """The folder of a run that stops after each of these steps, and is resumed."""
    folder = RunFolder(path)
    for place in stops:
        stop = StopRequest()

        class Asking(Callback):
            def step(self, report: StepReport, place: tuple[int, int] = place, stop: StopRequest = stop) -> None:
                stop.requested |= (report.epoch, report.step) == place

        assert run(config, folder, resume=folder.holds_run(), callback=Asking(), stop=stop) is None
    assert run(config, folder, resume=folder.holds_run()) is not None
    return folder


def states(folder: RunFolder) -> dict[str, Any]:
    """All that the last checkpoints hold, times and joules aside."""
    found = {}
    for phase in ("dense", "gated", "compact"):
        if has_checkpoint(folder.checkpoint(phase)):
            found[phase] = state = load_checkpoint(folder.checkpoint(phase))
            del state["config"]
            state["history"] = [
                {key: value for key, value in line.items() if "seconds" not in key and "energy" not in key}
                for line in state["history"]
            ]
    return found


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_ends_with_the_same_bits(
    name: str, archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "finish", lambda self, networks: {})  # what is measured there is not of training
    monkeypatch.setattr(pruner, "EVERY", 2)  # a run so short has no twenty steps with gates
    monkeypatch.setattr(models, "cifar_vgg", partial(cifar_vgg, widths=(8, 8, 8)))
    recipe = RECIPES[name]
    config = TrainConfig(
        **{"model": "resnet20", "epochs": 4, "batch_size": 16, "latency": False, "device": "cpu", "threads": 1}
        | recipe,
        data=f"npz:{archives[recipe.get('model', 'resnet20')]}",
    )
    expected = states(trained(config, tmp_path / "straight", []))
    assert len(expected) == (2 if config.consensus_at < 1 else 1)
    assert differences(expected, states(trained(config, tmp_path / "stopped", STOPS))) == []
