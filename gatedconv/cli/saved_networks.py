"""Networks and images of the commands that take RUN or MODEL."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gatedconv.deploy import load
from gatedconv.train.run_dir import RunFolder

KINDS = ("dense", "compact")


def saved_networks(target: Path) -> dict[str, nn.Module]:
    """The finished networks of a run folder ("dense", "compact"), or the one in a model file.

    Raises:
        ValueError: there is no such file or folder, or it is not a run or model.
    """
    if target.is_file():
        return {target.stem: load(target)}
    if not target.is_dir():
        raise ValueError(f"{target}: expected a run folder or a saved model, found nothing there")
    folder = RunFolder(target)
    found = {kind: load(folder.model(kind)) for kind in KINDS if folder.model(kind).is_file()}
    if not found:
        raise ValueError(
            f"{target}: expected a finished run with dense.safetensors or compact.safetensors, found neither"
        )
    return found


def compact_network(target: Path) -> tuple[str, nn.Module]:
    """The compact network of a run, its dense one if it has no gates, or that of a model file; and the file's name."""
    networks = saved_networks(target)
    name = "compact" if "compact" in networks else next(iter(networks))
    return name, networks[name]


def image_size(network: nn.Module, default: tuple[int, ...] = (3, 32, 32)) -> tuple[int, ...]:
    """The size of one image (C, H, W) that a network was built, gated or compacted for."""
    if size := vars(network).get("gatedconv_size"):
        return tuple(size[1:])
    return tuple(getattr(network, "input_size", default))


def example_input(network: nn.Module, batch: int = 1, size: tuple[int, ...] | None = None) -> torch.Tensor:
    """Random images (batch, C, H, W), of the network's own size by default; the same at every call."""
    return torch.randn((batch, *(size or image_size(network))), generator=torch.Generator().manual_seed(0))
