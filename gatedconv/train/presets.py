"""Named settings: `demo`, our recipes (`best-...`) and one that takes minutes (`fast-c10`)."""

from __future__ import annotations

import difflib
from typing import Any

Settings = dict[str, Any]

# The short tour. The MAC target is below the 50 % aimed at because gates are discrete: a layer gate of
# ResNet-20 moves a tenth of the MACs at once.
_DEMO: Settings = {
    "name": "demo",
    "data": "digits",
    "model": "resnet20",
    "gate": "layer",
    "position": "middle",  # for --gate channel: a middle gate takes work from both convolutions
    "estimator": "ste",
    "dense_baseline": True,
    "epochs": 40,
    "batch_size": 64,
    "lr": 0.1,
    "warmup_epochs": 2.0,
    "polar_weight": 3.0,
    "polar_schedule": "rising",
    "mac_weight": 4.0,
    "mac_target": 0.45,
    "gate_warmup": 0.1,
    "amp": "auto",
}

# Ours. Middle-channel gates: removing their channels saves work in both convolutions of a block. Polarization from the
# start keeps the samples in agreement; gates are pruned by rank while the learning rate is still high; the consensus
# comes at 71 % of the run. From the first pruned gate on, a dense copy of the network trains as the teacher of the
# gated one, to the end. docs/results.md has the ablations.
_BEST: Settings = {
    "epochs": 300,
    "batch_size": 128,
    "lr": 0.1,
    "schedule": "cosine",
    "warmup_epochs": 5.0,
    "nesterov": True,
    "weight_decay": 5e-4,
    "gate": "channel",
    "position": "middle",
    "polar_weight": 3.0,
    "polar_schedule": "constant",
    "mac_control": "rank",
    "mac_ramp": (0.2, 0.7),
    "mac_target": 0.48,
    "consensus_at": 0.7084,
    "teacher_at": 0.2,
    "amp": "auto",
}
_DEPTHS = (20, 32, 44, 56, 110)


def _best_presets() -> dict[str, Settings]:
    presets = {}
    for data, source in (("c10", "cifar10"), ("c100", "cifar100")):
        for depth in _DEPTHS:
            name = f"best-{data}-r{depth}"
            presets[name] = _BEST | {"name": name, "data": source, "model": f"resnet{depth}"}
    return presets


# The training of airbench94 (Jordan 2024, https://github.com/KellerJordan/cifar10-airbench), whose rates and decay are
# per example and decoupled; here they are SGD's: 11.5 / (1024 * (1 + 1 / 0.15)) * 1024 = 1.5 and 0.0153 / 11.5. Gates
# learn at the rate that they have in `best`. A third of the run is dense: in public logs of one-pass pruning removals
# after 27 % of it end 0.3 to 0.5 points above those at the start.
_FAST: Settings = {
    "name": "fast-c10",
    "data": "cifar10",
    "model": "cifar_vgg",
    "gate": "channel",
    "position": "middle",
    "epochs": 10,
    "batch_size": 1024,
    "lr": 1.5,
    "schedule": "triangular",
    "warmup_epochs": 2.3,
    "lr_end": 0.07,
    "momentum": 0.85,
    "weight_decay": 0.00133,
    "norm_bias_lr_factor": 64.0,
    "lookahead": 0.77,
    "label_smoothing": 0.2,
    "pad": 2,
    "border": "mirrored",
    "flip": "alternating",
    "gate_lr_factor": 0.07,
    "polar_weight": 3.0,
    "polar_schedule": "constant",
    "mac_control": "rank",
    "mac_ramp": (0.3, 0.48),
    "mac_target": 0.5,
    "consensus_at": 0.5,
    "bn_images": 10_240,
    "amp": "auto",
}

PRESETS: dict[str, Settings] = {"demo": _DEMO, "fast-c10": _FAST} | _best_presets()


def preset_settings(name: str) -> Settings:
    """The fields that a preset sets, a copy.

    Raises:
        ValueError: no preset of that name; the message has the nearest ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or ["demo"]
        raise ValueError(f"preset: unknown preset {name!r}; did you mean {' or '.join(near)}?")
    return dict(PRESETS[name])
