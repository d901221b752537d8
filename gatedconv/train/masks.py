"""Which gates are open: the file that keeps it, and the even choice that controls are held to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.deploy.atomic import write_atomic
from gatedconv.gates import find_gates, masks_for_target
from gatedconv.train.record import require_form

Figures = dict[str, Any]


def write_consensus(path: Path, masks: Mapping[str, Tensor], figures: Figures) -> None:
    """Keep masks and figures as JSON, whole or not at all."""
    shown = {name: "".join("1" if open_ else "0" for open_ in mask.tolist()) for name, mask in masks.items()}
    write_atomic(path, (json.dumps({"masks": shown, "figures": figures}, indent=1) + "\n").encode())


def read_consensus(path: Path) -> tuple[dict[str, Tensor], Figures]:
    """Masks bool (num_gates,) by gate path, and the figures written with them.

    Raises:
        ValueError: the file is missing, damaged or of another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected the consensus of a run, found nothing there") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the consensus of a run, could not read it ({error})") from None
    require_form(found, {"masks": dict, "figures": dict}, str(path))
    masks = {}
    for name, text in found["masks"].items():
        if not isinstance(text, str) or not text or set(text) - {"0", "1"}:
            raise ValueError(f"{path}: masks: {name}: expected zeros and ones, found {text!r}")
        masks[name] = torch.tensor([digit == "1" for digit in text])
    return masks, found["figures"]


def even_masks(model: nn.Module, target: float) -> dict[str, Tensor]:
    """The same share of every gate open, at ``target`` of the MACs; of layer gates, closed ones spread evenly."""
    scores = {}
    for index, (name, gate) in enumerate(find_gates(model).items()):
        within = (torch.arange(gate.num_gates, dtype=torch.float64) + 0.5) / gate.num_gates
        scores[name] = within + 1e-6 * _spread(index + 1)
    return masks_for_target(model, scores, target)


def _spread(index: int) -> float:
    """Van der Corput's sequence 1/2, 1/4, 3/4, 1/8, ...: any beginning of it covers [0, 1] evenly."""
    value, unit = 0.0, 0.5
    while index:
        value += unit * (index & 1)
        index, unit = index >> 1, unit / 2
    return value
