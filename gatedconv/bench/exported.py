"""The ONNX file of a network, from which the other runtimes start, and what all of them share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from gatedconv.deploy import export

Run = Callable[[], Tensor]
"""Computes the output of a prepared network for its batch."""


def onnx_file(network: nn.Module, x: Tensor, folder: Path) -> Path:
    """The network's ONNX file in a folder; its batch is free."""
    return made_once(folder / "network.onnx", lambda path: export(network, path, x, "onnx"))


def made_once(path: Path, make: Callable[[Path], object], weights: str = "") -> Path:
    """The path of a file, made where it is missing; one that was not finished does not count.

    Args:
        path: the file.
        make: writes it to the path that it is given.
        weights: the suffix, such as ".bin", of a second file that `make` writes with it.
    """
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        make(part)
        if weights:
            os.replace(part.with_suffix(weights), path.with_suffix(weights))
        os.replace(part, path)
    return path
