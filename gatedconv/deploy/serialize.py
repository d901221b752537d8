"""Saving and loading: one safetensors file whose header says in JSON what to build. Never a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.convert import Conversion
from gatedconv.deploy.compact import compact
from gatedconv.deploy.describe_graph import build_graph, describe_graph
from gatedconv.deploy.freeze import Consensus, freeze_gates
from gatedconv.gates import FrozenGate, MacTerm, find_gates, unwrap
from gatedconv.models import BUILDERS, ResNet
from gatedconv.nn import GraphNet

FORMAT = "gatedconv"
VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one file, from which ``load`` rebuilds it without the code that trained it.

    The file is replaced as a whole or not at all.

    Args:
        model: one of ``gatedconv.models`` (dense, gated, frozen or compact), or what ``gate_model``,
            ``freeze`` and ``compact`` make of any other. Weights keep their dtype.
        path: the file, ``.safetensors`` by custom.

    Raises:
        TypeError: for a model that has no description: a module with code of its own.
        OSError: where the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    model = unwrap(model)
    if isinstance(model, ResNet):
        description = _describe(model)
    elif isinstance(model, GraphNet):
        description = _describe_net(model)
    else:
        raise TypeError(
            f"save: a file holds models of gatedconv.models, and what gate_model or compact returns as a graph; a "
            f"{type(model).__name__} has code of its own. gatedconv.export writes any model for a runtime"
        )
    # Copies: tensors that share their memory are written each by itself.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_atomically(Path(path), to_bytes(tensors, {FORMAT: json.dumps(description)}))


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


def _describe_net(model: GraphNet) -> dict[str, Any]:
    description: dict[str, Any] = {"version": VERSION, "stage": "graph", "graph": describe_graph(model)}
    if consensus := getattr(model, "consensus", None):
        description["consensus"] = _describe_consensus(consensus)
    if terms := getattr(model, "mac_terms", None):
        description["mac_terms"] = [[t.macs, t.params, t.gates, t.channels] for t in terms]
    if conversion := getattr(model, "conversion", None):
        description["conversion"] = dataclasses.asdict(conversion)
    if size := getattr(model, "input_size", None):
        description["input_size"] = list(size)
    return description


def _describe_consensus(consensus: Consensus) -> dict[str, Any]:
    return {
        "masks": {name: mask.int().tolist() for name, mask in consensus.masks.items()},
        "agreement": consensus.agreement,
        "gate_agreement": consensus.gate_agreement,
        "open_rates": {name: rate.tolist() for name, rate in consensus.open_rates.items()},
    }


def _describe(model: ResNet) -> dict[str, Any]:
    consensus: Consensus | None = getattr(model, "consensus", None)
    gates = find_gates(model)
    frozen = any(isinstance(gate, FrozenGate) for gate in gates.values())
    stage = "frozen" if frozen else "gated" if gates else "compact" if consensus else "dense"
    description: dict[str, Any] = {"version": VERSION, "model": model.config, "stage": stage}
    if consensus is not None:
        description["consensus"] = _describe_consensus(consensus)
    return description


def _rebuild(path: Path, header: str, tensors: dict[str, Tensor]) -> nn.Module:
    try:
        description = json.loads(header)
        version = description["version"]
        if version > VERSION:
            raise _Newer(f"load: {path} has format version {version}; this gatedconv reads up to {VERSION}")
        model = _build_net(description, tensors) if "graph" in description else _build_resnet(path, description)
    except _Newer:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"load: the description in {path} is damaged: {error!r}") from error
    floats = [value.dtype for value in tensors.values() if value.is_floating_point()]
    try:
        model.to(floats[0] if floats else torch.get_default_dtype()).load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"load: the tensors in {path} do not fit its description: {first}") from error
    return model.eval()


class _Newer(ValueError):
    """A file of a later version."""


def _build_resnet(path: Path, description: dict[str, Any]) -> nn.Module:
    config = dict(description["model"])
    name = config.pop("name")
    if name not in BUILDERS:
        raise ValueError(f"load: {path} holds an unknown model {name!r}; known: {', '.join(BUILDERS)}")
    config["input_size"] = tuple(config["input_size"])
    model: nn.Module = BUILDERS[name](**config)
    if description["stage"] in ("frozen", "compact"):
        model = _reshape(model, description, config["input_size"])
    return model


def _build_net(description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    model = build_graph(description["graph"], tensors)
    if "consensus" in description:
        model.consensus = _consensus(description["consensus"])
    if "mac_terms" in description:
        model.mac_terms = [
            MacTerm(macs, params, tuple(gates), tuple(None if c is None else tuple(c) for c in channels))
            for macs, params, gates, channels in description["mac_terms"]
        ]
    if "conversion" in description:
        model.conversion = Conversion(**description["conversion"])
    if "input_size" in description:
        model.input_size = tuple(description["input_size"])
    return model


def _consensus(stored: dict[str, Any]) -> Consensus:
    return Consensus(
        {name: torch.tensor(mask, dtype=torch.bool) for name, mask in stored["masks"].items()},
        stored["agreement"],
        stored["gate_agreement"],
        {name: torch.tensor(rate) for name, rate in stored["open_rates"].items()},
    )


def _reshape(model: nn.Module, description: dict[str, Any], input_size: tuple[int, ...]) -> nn.Module:
    consensus = _consensus(description["consensus"])
    frozen = freeze_gates(model, consensus.masks)
    frozen.consensus = consensus
    if description["stage"] == "frozen":
        return frozen
    return compact(frozen.eval(), torch.zeros(1, *input_size))
