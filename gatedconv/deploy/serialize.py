"""Saving and loading: one safetensors file whose header says in JSON what to build. Never a pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv._io import write_atomic
from gatedconv.convert import Conversion
from gatedconv.deploy.compact import compact
from gatedconv.deploy.describe_graph import build_graph, describe_graph
from gatedconv.deploy.freeze import Consensus, freeze_gates
from gatedconv.gating import FrozenGate, MacTerm, find_gates, unwrap
from gatedconv.models import BUILDERS, ResNet
from gatedconv.nn import CompactBlock, GraphNet

FORMAT = "gatedconv"
VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one file, from which ``load`` rebuilds it without the code that trained it.

    The file is replaced as a whole or not at all.

    Args:
        model: one of ``gatedconv.models`` (dense, gated, frozen or compact), or what ``gate_model``,
            ``freeze`` and ``compact`` make of any other, or an ``Engine`` of one of them, which is packed anew when
            it is loaded. Weights keep their dtype.
        path: the file, ``.safetensors`` by custom.

    Raises:
        TypeError: for a model that has no description: a module with code of its own, or one of ours that was
            changed by hand so that it cannot be built again.
        OSError: where the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    from gatedconv.engine import Engine

    _require_path(path, "save")
    model = unwrap(model)
    example_size = None
    if isinstance(model, Engine):
        example_size, source = list(model.example_size), model.source
        assert isinstance(source, nn.Module)  # mypy: what a Module's attribute may be
        model = source
    if isinstance(model, ResNet):
        description = _describe(model)
    elif isinstance(model, GraphNet):
        description = _describe_net(model)
    else:
        raise TypeError(
            f"save: a file holds models of gatedconv.models, and what gate_model or compact returns as a graph; a "
            f"{type(model).__name__} has code of its own. gatedconv.export writes any model for a runtime"
        )
    if example_size is not None:
        description["engine"] = example_size
    # Copies: tensors that share their memory are written each by itself.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    header = json.dumps(description)
    try:  # a file that cannot be read again is found out now, not when it is needed
        _rebuild(Path(path), header, tensors)
    except ValueError as error:
        raise TypeError(f"save: the model is not what its description builds any more: {error}") from error
    write_atomic(Path(path), to_bytes(tensors, {FORMAT: header}))


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Read what ``save`` wrote: the same model, in eval mode, on the CPU; an ``Engine`` as one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, cut short, foreign, or written by a newer version.
    """
    from safetensors import SafetensorError, safe_open

    _require_path(path, "load")
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
    model = _rebuild(path, header, tensors)
    example_size = json.loads(header).get("engine")
    return model if example_size is None else _engine(path, model, example_size)


def _require_path(path: Any, where: str) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: path must be a str or os.PathLike, got {type(path).__name__}")


def _engine(path: Path, model: nn.Module, example_size: Any) -> nn.Module:
    from gatedconv.engine import Engine

    dtype = next((value.dtype for value in model.parameters()), torch.float32)
    try:
        return Engine(model, torch.zeros(example_size, dtype=dtype, device="cpu"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"load: the description in {path} is damaged: {error!r}") from error


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
    if size := getattr(model, "fixed_size", None):
        description["fixed_size"] = list(size)
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
    masks = {name: gate.mask for name, gate in gates.items() if isinstance(gate, FrozenGate)}
    cut = any(isinstance(module, CompactBlock) for module in model.modules())
    stage = "frozen" if masks else "gated" if gates else "compact" if cut else "dense"
    if consensus is not None and masks:  # a state dict may have moved them since the vote
        consensus = dataclasses.replace(consensus, masks=masks)
    description: dict[str, Any] = {"version": VERSION, "model": model.config, "stage": stage}
    if consensus is not None:
        description["consensus"] = _describe_consensus(consensus)
    if multiple := vars(model).get("channel_multiple"):
        description["channel_multiple"] = multiple
    return description


def _rebuild(path: Path, header: str, tensors: dict[str, Tensor]) -> nn.Module:
    try:
        description = json.loads(header)
        version = description["version"]
        if isinstance(version, bool) or not isinstance(version, int) or version > VERSION:
            raise _Newer(f"load: {path} has format version {version!r}; this gatedconv reads up to {VERSION}")
        model = _build_net(description, tensors) if "graph" in description else _build_resnet(path, description)
    except _Newer:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"load: the description in {path} is damaged: {error!r}") from error
    try:
        model.load_state_dict(tensors, assign=True)  # each tensor in the dtype that it was saved in
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
        vars(model)["consensus"] = _consensus(description["consensus"])
    if "mac_terms" in description:
        vars(model)["mac_terms"] = [
            MacTerm(macs, params, tuple(gates), tuple(None if c is None else tuple(c) for c in channels))
            for macs, params, gates, channels in description["mac_terms"]
        ]
    if "conversion" in description:
        vars(model)["conversion"] = Conversion(**description["conversion"])
    if "input_size" in description:
        vars(model)["input_size"] = tuple(description["input_size"])
    if "fixed_size" in description:
        height, width = description["fixed_size"]
        vars(model)["fixed_size"] = (int(height), int(width))
    return model


def _consensus(stored: dict[str, Any]) -> Consensus:
    return Consensus(
        {name: torch.tensor(mask, dtype=torch.bool) for name, mask in stored["masks"].items()},
        stored["agreement"],
        stored["gate_agreement"],
        {name: torch.tensor(rate) for name, rate in stored["open_rates"].items()},
    )


def _reshape(model: nn.Module, description: dict[str, Any], input_size: tuple[int, ...]) -> nn.Module:
    stored = description.get("consensus")
    consensus = _consensus(stored) if stored else None
    frozen = freeze_gates(model, consensus.masks if consensus else {})
    if consensus is not None:
        vars(frozen)["consensus"] = consensus
    if description["stage"] == "frozen":
        return frozen
    return compact(frozen.eval(), torch.zeros(1, *input_size), channel_multiple=description.get("channel_multiple", 1))
