"""Which gates are open: the file that keeps it, and the even choice that controls are held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv._io import write_atomic
from gatedconv.deploy import Consensus
from gatedconv.gating import find_gates, masks_for_target
from gatedconv.train.record import NUMBER, require_form

Figures = dict[str, Any]
_FORM = {
    "masks": dict,
    "figures": {"agreement?": (*NUMBER, type(None)), "gate_agreement?": dict},
    "open_rates?": dict,
}


def write_consensus(path: Path, consensus: Consensus, figures: Figures) -> None:
    """Keep the consensus and its figures, which tell the agreement, as JSON, whole or not at all."""
    kept = {
        "masks": {name: "".join(str(int(open_)) for open_ in mask.tolist()) for name, mask in consensus.masks.items()},
        # Nine digits tell any float32 from every other.
        "open_rates": {
            name: " ".join(f"{rate:.9g}" for rate in rates.tolist()) for name, rates in consensus.open_rates.items()
        },
        "figures": figures,
    }
    write_atomic(path, (json.dumps(kept, indent=1) + "\n").encode())


def read_consensus(path: Path) -> tuple[Consensus, Figures]:
    """What `write_consensus` kept, tensors on the CPU; a file from before it kept open rates has none.

    Raises:
        ValueError: the file is missing, damaged or of another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected the consensus of a run, found nothing there") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the consensus of a run, could not read it ({error})") from None
    require_form(found, _FORM, str(path))
    masks, figures = {}, found["figures"]
    for name, text in found["masks"].items():
        if not isinstance(text, str) or not text or set(text) - {"0", "1"}:
            raise ValueError(f"{path}: masks: {name}: expected zeros and ones, found {text!r}")
        masks[name] = torch.tensor([digit == "1" for digit in text])
    rates = {name: _rates(text, f"{path}: open_rates: {name}") for name, text in found.get("open_rates", {}).items()}
    sizes = {name: rate.shape for name, rate in rates.items()}
    if rates and sizes != {name: mask.shape for name, mask in masks.items()}:
        raise ValueError(f"{path}: open_rates: expected a number for each of the masks, found others")
    return Consensus(masks, figures.get("agreement"), figures.get("gate_agreement", {}), rates), figures


def _rates(text: Any, where: str) -> Tensor:
    try:
        return torch.tensor([float(rate) for rate in text.split()])
    except (AttributeError, ValueError):
        raise ValueError(f"{where}: expected numbers, found {text!r}") from None


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
