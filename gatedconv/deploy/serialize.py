"""Saving and loading: one safetensors file whose header says in JSON what to build. Never a pickle."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.deploy.compact import compact
from gatedconv.deploy.freeze import Consensus, freeze_gates
from gatedconv.gates import FrozenGate, find_gates, unwrap
from gatedconv.models import BUILDERS, ResNet

FORMAT = "gatedconv"
VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model of ``gatedconv.models`` (dense, gated, frozen or compact) to one file.

    The file is replaced as a whole or not at all.

    Args:
        model: the model; its weights keep their dtype.
        path: the file, ``.safetensors`` by custom.

    Raises:
        TypeError: for a model that gatedconv cannot rebuild from a description.
        OSError: where the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    model = unwrap(model)
    if not isinstance(model, ResNet):
        raise TypeError(
            f"save: only models of gatedconv.models can be rebuilt from a file, got {type(model).__name__}; "
            "gatedconv.export writes any model for a runtime"
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(Path(path), to_bytes(tensors, {FORMAT: json.dumps(_describe(model))}))


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Read what ``save`` wrote: the same model, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, cut short, foreign, or written by a newer version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load: {path} is not a whole safetensors file: {error}") from error
    if header is None:
        raise ValueError(f"load: {path} is a safetensors file, but gatedconv did not write it")
    return _rebuild(path, header, tensors)


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk, rename it: all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _describe(model: ResNet) -> dict[str, Any]:
    consensus: Consensus | None = getattr(model, "consensus", None)
    gates = find_gates(model)
    frozen = any(isinstance(gate, FrozenGate) for gate in gates.values())
    stage = "frozen" if frozen else "gated" if gates else "compact" if consensus else "dense"
    description: dict[str, Any] = {"version": VERSION, "model": model.config, "stage": stage}
    if consensus is not None:
        description["consensus"] = {
            "masks": {name: mask.int().tolist() for name, mask in consensus.masks.items()},
            "agreement": consensus.agreement,
            "gate_agreement": consensus.gate_agreement,
            "open_rates": {name: rate.tolist() for name, rate in consensus.open_rates.items()},
        }
    return description


def _rebuild(path: Path, header: str, tensors: dict[str, Tensor]) -> nn.Module:
    try:
        description = json.loads(header)
        version = description["version"]
        if version > VERSION:
            raise ValueError(f"load: {path} has format version {version}; this gatedconv reads up to {VERSION}")
        config = dict(description["model"])
        name = config.pop("name")
        if name not in BUILDERS:
            raise ValueError(f"load: {path} holds an unknown model {name!r}; known: {', '.join(BUILDERS)}")
        config["input_size"] = tuple(config["input_size"])
        model: nn.Module = BUILDERS[name](**config)
        if description["stage"] in ("frozen", "compact"):
            model = _reshape(model, description, config["input_size"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"load: the description in {path} is damaged: {error!r}") from error
    floats = [value.dtype for value in tensors.values() if value.is_floating_point()]
    try:
        model.to(floats[0] if floats else torch.get_default_dtype()).load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"load: the tensors in {path} do not fit its description: {first}") from error
    return model.eval()


def _reshape(model: nn.Module, description: dict[str, Any], input_size: tuple[int, ...]) -> nn.Module:
    stored = description["consensus"]
    masks = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in stored["masks"].items()}
    frozen = freeze_gates(model, masks)
    frozen.consensus = Consensus(
        masks, stored["agreement"], stored["gate_agreement"],
        {name: torch.tensor(rate) for name, rate in stored["open_rates"].items()},
    )
    if description["stage"] == "frozen":
        return frozen
    return compact(frozen.eval(), torch.zeros(1, *input_size))
