"""The presets of the paper, `paper-c10-r56-layer` and so on, in addition to those of the package."""

from __future__ import annotations

from typing import Any

from gatedconv.train.presets import preset_settings as package_preset

Settings = dict[str, Any]

# Section 4.1 of the paper. Weight decay is printed "5x10^4"; the sign was lost. The network is gated with
# projection shortcuts: only those give the 255.3 M FLOPs that the paper prints for ResNet-110.
_COMMON: Settings = {
    "epochs": 350,
    "lr": 0.1,
    "schedule": "staged",
    "lr_decay": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "shortcut": "B",
    "estimator": "ste",
    "seed": 1,
    "polar_weight": 3.0,
    "polar_schedule": "rising",
    "bn_reestimate": False,
}
TABLE1: Settings = {"estimator": "gumbel", "act_weight": 0.5}  # of "Ours" in Table 1, where λ_act is not printed
_DATA: dict[str, Settings] = {
    "c10": {"data": "cifar10", "batch_size": 256},
    "c100": {"data": "cifar100", "batch_size": 64},
}
# As printed, CIFAR-10 has 60/120/160 and CIFAR-100 has 125/190/250 (of 350 epochs). Table 6 switches λ at
# 125 and 190 on CIFAR-10, so the two lists were probably exchanged in print: "-swapped" is that reading.
_MILESTONES = {
    "c10": tuple(epoch / 350 for epoch in (60, 120, 160)),
    "c100": tuple(epoch / 350 for epoch in (125, 190, 250)),
}
_GATES: dict[str, Settings] = {
    "dense": {"gate": "none"},
    "layer": {"gate": "layer"},
    # "2FC-after" of Table 3, its input flattened as in Table 2.
    "channel": {"gate": "channel", "position": "after", "hidden": 16, "pool": "flatten"},
}


def _presets() -> dict[str, Settings]:
    presets = {}
    for data, other in (("c10", "c100"), ("c100", "c10")):
        for depth in (56, 110):
            for gate, gate_settings in _GATES.items():
                for suffix, milestones in (("", _MILESTONES[data]), ("-swapped", _MILESTONES[other])):
                    name = f"paper-{data}-r{depth}-{gate}{suffix}"
                    settings = {"name": name, "model": f"resnet{depth}", "milestones": milestones}
                    presets[name] = _COMMON | _DATA[data] | gate_settings | settings
    return presets


PAPER = _presets()


def paper_settings(name: str) -> Settings:
    """The config fields that a preset of the paper, or of the package, sets; a copy.

    Raises:
        ValueError: no preset of that name.
    """
    return dict(PAPER[name]) if name in PAPER else package_preset(name)
