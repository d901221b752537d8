"""The paper's naive baselines: a trained dense network with random parts left out when it is evaluated."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gatedconv import models
from gatedconv.deploy import compact, freeze
from gatedconv.models import ResNet


def drop_parameters(dense: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy with ``share`` (0 to 1) of its weights and biases, drawn uniformly, set to 0; its MACs are unchanged."""
    copied = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(copied.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    kept = torch.ones(count, dtype=torch.bool)
    kept[torch.randperm(count, generator=generator)[: round(share * count)]] = False
    with torch.no_grad():
        for parameter, mask in zip(parameters, kept.split([p.numel() for p in parameters]), strict=True):
            parameter.mul_(mask.view_as(parameter).to(parameter))
    return copied


def drop_layers(dense: ResNet, share: float, seed: int) -> nn.Module:
    """A copy without ``share`` (0 to 1) of its residual branches, drawn at random; the shortcuts remain."""
    options = {key: dense.config[key] for key in ("num_classes", "shortcut")}
    gated: ResNet = getattr(models, dense.config["name"])(
        gate="layer", input_size=tuple(dense.config["input_size"]), **options
    )
    gated.load_state_dict(dense.state_dict(), strict=False)
    names = [name for name, module in gated.named_modules() if name.endswith("layer_gate")]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    closed = {names[index] for index in order[: round(share * len(names))]}
    masks = {name: torch.tensor([name not in closed]) for name in names}
    return compact(freeze(gated, masks=masks).eval(), torch.zeros(1, *dense.config["input_size"]))
