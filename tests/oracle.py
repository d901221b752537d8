"""An independent forward of a gated CIFAR ResNet with its masks forced.

Plain functions over the state dict, written from the paper's text; it imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def _norm(x: Tensor, sd: Mapping[str, Tensor], name: str) -> Tensor:
    scale = sd[f"{name}.weight"] / (sd[f"{name}.running_var"] + EPS).sqrt()
    shift = sd[f"{name}.bias"] - sd[f"{name}.running_mean"] * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _shortcut(x: Tensor, sd: Mapping[str, Tensor], block: str, stride: int, channels: int) -> Tensor:
    if f"{block}.downsample.0.weight" in sd:
        return _norm(F.conv2d(x, sd[f"{block}.downsample.0.weight"], stride=stride), sd, f"{block}.downsample.1")
    if stride == 1 and x.shape[1] == channels:
        return x
    out = x.new_zeros(x.shape[0], channels, -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    front = (channels - x.shape[1]) // 2
    out[:, front : front + x.shape[1]] = x[:, :, ::stride, ::stride]
    return out


def forced_forward(x: Tensor, sd: Mapping[str, Tensor], masks: Mapping[str, Tensor], position: str) -> Tensor:
    """Eval-mode logits; ``masks`` maps gate paths to bool tensors, absent gates are open."""
    x = F.relu(_norm(F.conv2d(x, sd["conv1.weight"], padding=1), sd, "bn1"))
    for stage in (1, 2, 3):
        depth = len({name.split(".")[1] for name in sd if name.startswith(f"layer{stage}.")})
        for index in range(depth):
            block = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            channel = masks.get(f"{block}.channel_gate")
            factor = None if channel is None else channel.to(x.dtype).view(1, -1, 1, 1)
            h = x * factor if factor is not None and position == "before" else x
            h = F.relu(_norm(F.conv2d(h, sd[f"{block}.conv1.weight"], stride=stride, padding=1), sd, f"{block}.bn1"))
            h = h * factor if factor is not None and position == "middle" else h
            h = _norm(F.conv2d(h, sd[f"{block}.conv2.weight"], padding=1), sd, f"{block}.bn2")
            h = h * factor if factor is not None and position == "after" else h
            layer = masks.get(f"{block}.layer_gate")
            h = h if layer is None else h * layer.to(x.dtype)
            x = F.relu(_shortcut(x, sd, block, stride, h.shape[1]) + h)
    return F.linear(x.mean(dim=(2, 3)), sd["fc.weight"], sd["fc.bias"])


def random_masks(sizes: Mapping[str, int], kind: str, seed: int) -> dict[str, Tensor]:
    """Masks by kind: all open, all closed, one open, or random with an odd number open."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, size in sizes.items():
        mask = torch.zeros(size, dtype=torch.bool)
        if kind == "open":
            mask[:] = True
        elif kind == "one":
            mask[int(torch.randint(size, (1,), generator=generator))] = True
        elif kind == "odd":
            count = 2 * int(torch.randint((size + 1) // 2, (1,), generator=generator)) + 1
            mask[torch.randperm(size, generator=generator)[:count]] = True
            if size == 1:
                mask[0] = bool(torch.rand((), generator=generator) < 0.5)
        masks[name] = mask
    return masks


def randomize_statistics(model: torch.nn.Module, seed: int) -> None:
    """Norms as after training: without this a fresh net hardly reacts to its branches."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
