"""Saving and loading: one safetensors file with a JSON description of the network in its header. Never a pickle."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv._io import write_atomic
from gatedconv.convert import Conversion
from gatedconv.deploy.compact import compact, current_consensus
from gatedconv.deploy.engine_hooks import engine_hooks
from gatedconv.deploy.freeze import freeze_gates
from gatedconv.deploy.graph import write_graph
from gatedconv.deploy.graph_format import build_graph, describe_graph, require_small
from gatedconv.deploy.graph_writer import NoGraph
from gatedconv.deploy.module_changes import apply_changes, describe_changes, ties_of
from gatedconv.gating import Consensus, FrozenGate, MacTerm, attribute_of, eval_mode, find_gates, unwrap
from gatedconv.models import BUILDERS, CifarVGG, ResNet
from gatedconv.nn import CompactBlock, GraphNet

FORMAT = "gatedconv"
VERSION = 1
# What a file may ask for beyond the size of its own tensors: an example input of 22 images of a megapixel, a network of
# ours of 1 GB (110 layers have 1.7 million parameters), and settings such as depth and widths.
_LARGEST_EXAMPLE, _LARGEST_MODEL, _LARGEST_SETTING = 1 << 26, 1 << 28, 1 << 12

_PRODUCTS = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one file, from which ``load`` rebuilds it without the code that trained it.

    The file is replaced as a whole or not at all. It holds tensors and JSON, never a pickle: of a network of
    ``gatedconv.models`` how to build it; of any other its tensors, what ``gate_model``, ``freeze`` and ``compact``
    changed in its modules, and, where its forward can be written down so, a graph of torch.nn layers.

    Args:
        model: one of ``gatedconv.models`` (dense, gated, frozen or compact), or what ``gate_model``,
            ``freeze`` and ``compact`` make of any other, or an ``Engine`` of one of them, which is packed anew when
            it is loaded. Weights keep their dtype, and shared tensors stay shared.
        path: the file, ``.safetensors`` by custom.

    Raises:
        TypeError: for a model that has no description: one that gatedconv did not make, or one of ours that was
            changed by hand so that it cannot be built again.
        OSError: where the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    _require_path(path, "save")
    _require_module(model, "save: the model")
    model = unwrap(model)
    example_size = products = None
    if type(model) is engine_hooks().kind:
        model, example_size, products = engine_hooks().unpack(model)
    ties = ties_of(model)
    with eval_mode(model):  # copies: some classes merge weights there, and tensors may share their memory
        state = {name: _copy(tensor) for name, tensor in model.state_dict().items() if name not in ties}
    description = _describe(model) if isinstance(model, (CifarVGG, ResNet)) else {}
    # What gate_model put into a network of ours is no part of how it is built.
    if not description or (
        "gatedconv_size" in vars(model) and not _is_built_by(path, description | {"ties": ties}, state)
    ):
        description, more = _describe_net(model, example_size)
        state |= more
    if ties:
        description["ties"] = ties
    if example_size is not None:
        description["engine"], description["products"] = example_size, str(products).removeprefix("torch.")
    tensors = {name: value.contiguous() for name, value in state.items()}
    header = json.dumps(description)
    if "changes" not in description or "graph" in description:
        try:  # detects a file that cannot be read again now, not when it is needed
            _rebuild(Path(path), header, tensors)
        except ValueError as error:
            raise TypeError(
                f"save: the model has changed since it was built: its description no longer matches: {error}"
            ) from error
    write_atomic(Path(path), to_bytes(tensors, {FORMAT: header}))


def _is_built_by(path: str | os.PathLike[str], description: dict[str, Any], state: dict[str, Tensor]) -> bool:
    try:
        _rebuild(Path(path), json.dumps(description), state)
    except ValueError:
        return False
    return True


@torch.inference_mode(False)  # parameters that are made in inference mode cannot be trained
def load(path: str | os.PathLike[str], *, into: nn.Module | None = None) -> nn.Module:
    """Read what ``save`` wrote: the same model, in eval mode, on the CPU; an ``Engine`` as one.

    Args:
        path: the file.
        into: the dense network that was gated, built by your own code: the result is a copy of it, of the same class,
            with the file's gates or smaller layers and its tensors; it can be trained further. None: networks of
            ``gatedconv.models`` are built, others become a graph of torch.nn layers, in eval alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, cut short, foreign, or written by a newer version; a network that the
            file does not fit; a file that needs ``into``.
    """
    from safetensors import SafetensorError, safe_open

    _require_path(path, "load")
    if into is not None:
        _require_module(into, "load: into")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load: {path} is not a complete safetensors file: {error}") from error
    if header is None:
        raise ValueError(f"load: {path} is a safetensors file, but gatedconv did not write it")
    model = _rebuild(path, header, tensors, into)
    description = json.loads(header)
    return _packed(path, model, description, tensors) if "engine" in description and into is None else model


def _require_module(model: Any, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} must be a torch.nn.Module, got {type(model).__name__}")


def _require_path(path: Any, where: str) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: path must be a str or os.PathLike, got {type(path).__name__}")


def _packed(path: Path, model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    size = description["engine"]
    try:
        require_small(size, tensors)
        _require_example(size)
        return engine_hooks().pack(model, size, _PRODUCTS[description["products"]])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"load: the description in {path} is damaged: {error!r}") from error


def _require_example(size: Sequence[int]) -> None:
    """ValueError for the size of an example, from a file, that no memory should be given to."""
    if math.prod(size) > _LARGEST_EXAMPLE:
        raise ValueError(f"an example of size {list(size)} has more than {_LARGEST_EXAMPLE:,} numbers")


def _describe_net(model: nn.Module, example_size: list[int] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a network of another package, and tensors of its graph beyond its state."""
    description: dict[str, Any] = {"version": VERSION, "stage": "graph"}
    graph: GraphNet | None
    if isinstance(model, GraphNet):
        graph = model
        description["graph"] = describe_graph(graph)
    else:
        size = vars(model).get("gatedconv_size") or example_size
        description["stage"], description["class"] = "module", type(model).__qualname__
        description["changes"] = describe_changes(model)
        try:
            if size is None:
                raise NoGraph("gatedconv has not seen an image that it takes")
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            graph = write_graph(model, tuple(size), dtype)
            description["graph"] = describe_graph(graph)
        except (NoGraph, TypeError) as error:  # such a file is loaded into the user's own network
            if not description["changes"]:
                raise TypeError(
                    f"save: gatedconv changed nothing in this {type(model).__name__}, and its forward cannot be "
                    f"written as a graph ({error}); save its state_dict, or write it by gatedconv.export"
                ) from error
            description["no_graph"] = str(error)[:300]
            graph = None
    if graph is not None and "fixed_size" in vars(graph):
        description["fixed_size"] = list(vars(graph)["fixed_size"])
    if consensus := current_consensus(model):
        description["consensus"] = _describe_consensus(consensus)
    if terms := attribute_of(model, "mac_terms", list):
        description["mac_terms"] = [[t.macs, t.params, t.gates, t.channels] for t in terms]
    if conversion := attribute_of(model, "conversion", Conversion):
        description["conversion"] = dataclasses.asdict(conversion)
    if size := vars(model).get("gatedconv_size"):
        description["example_size"] = list(size)
    own = model.state_dict()
    more = {} if graph is None else {name: _copy(t) for name, t in graph.state_dict().items() if name not in own}
    if more:
        description["extra"] = sorted(more)
    return description, more


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _describe_consensus(consensus: Consensus) -> dict[str, Any]:
    return {
        "masks": {name: mask.int().tolist() for name, mask in consensus.masks.items()},
        "agreement": consensus.agreement,
        "gate_agreement": consensus.gate_agreement,
        "open_rates": {name: rate.tolist() for name, rate in consensus.open_rates.items()},
    }


def _describe(model: CifarVGG | ResNet) -> dict[str, Any]:
    consensus, gates = current_consensus(model), find_gates(model)
    frozen = any(isinstance(gate, FrozenGate) for gate in gates.values())
    is_small = model.config["gate"] or any(isinstance(module, CompactBlock) for module in model.modules())
    stage = "frozen" if frozen else "gated" if gates else "compact" if is_small else "dense"
    description: dict[str, Any] = {"version": VERSION, "model": model.config, "stage": stage}
    if consensus is not None:
        description["consensus"] = _describe_consensus(consensus)
    if multiple := vars(model).get("gatedconv_multiple"):
        description["channel_multiple"] = multiple
    return description


def _rebuild(path: Path, header: str, tensors: dict[str, Tensor], into: nn.Module | None = None) -> nn.Module:
    description: Any = None
    try:
        description = json.loads(header)
        version = description["version"]
        if isinstance(version, bool) or not isinstance(version, int) or version > VERSION:
            raise _Unfit(f"load: {path} has format version {version!r}; this gatedconv reads up to {VERSION}")
        tensors = dict(tensors)
        for copied, original in dict(description.get("ties", {})).items():
            tensors[copied] = tensors[original]
        if into is not None:
            if "changes" not in description:
                raise _Unfit(f"load: {path} holds a model that is built without into=")
            for name in description.get("extra", ()):
                tensors.pop(name)
            model = apply_changes(into, description["changes"], tensors)
            _set_attributes(model, description)
        elif "graph" in description:
            model = _build_net(description, tensors)
            missing = model.state_dict().keys()
            tensors = {name: tensor for name, tensor in tensors.items() if name in missing}
        elif "changes" in description:
            raise _Unfit(
                f"load: {path} holds a {description['class']}, whose forward no graph describes "
                f"({description.get('no_graph', '')}): build the dense network and pass it as into="
            )
        else:
            model = _build_ours(path, description, tensors)
    except _Unfit:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise _misfit(path, description, into, f"the description in {path} is damaged: {error!r}") from error
    try:
        _require_kinds(model, tensors)
        model.load_state_dict(tensors, assign=True)  # each tensor in the dtype that it was saved in
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise _misfit(path, description, into, f"the tensors in {path} do not fit its description: {first}") from error
    _tie(model, dict(description.get("ties", {})))
    model.eval()
    return model


def _misfit(path: Path, description: Any, into: nn.Module | None, why: str) -> ValueError:
    """The error for a file whose parts contradict each other, or that does not match ``into``."""
    if into is None or not isinstance(description, dict):
        return ValueError(f"load: {why}")
    saved, given = description.get("class", "network"), type(into).__name__
    return ValueError(f"load: {path} holds a {saved}, which does not match the {given} passed as into=, or {why}")


def _require_kinds(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """RuntimeError where a tensor is complex, real or integer, and the model's is another."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (tensor, own.get(name, tensor))]
        if kinds[0] != kinds[1]:
            raise RuntimeError(f"{name} is {tensor.dtype}, expected {own[name].dtype}")


def _tie(model: nn.Module, ties: dict[str, str]) -> None:
    """Shared tensors are one again."""
    for copied, original in ties.items():
        owner, _, name = copied.rpartition(".")
        source, _, attribute = original.rpartition(".")
        try:
            value = getattr(model.get_submodule(source), attribute)
            setattr(model.get_submodule(owner), name, value)
        except AttributeError:  # a graph without one of them
            continue


class _Unfit(ValueError):
    """A complete file that cannot be loaded this way, or by this version."""


def _build_ours(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    config = dict(description["model"])
    name = config.pop("name")
    if name not in BUILDERS:
        raise ValueError(f"load: {path} holds an unknown model {name!r}; known: {', '.join(BUILDERS)}")
    size = tuple(config.pop("input_size"))
    _require_example(size)
    require_small(config, tensors, _LARGEST_SETTING)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in BUILDERS[name](**config, input_size=size).parameters())
    if parameters > _LARGEST_MODEL:
        raise ValueError(f"a {name} of {parameters:,} parameters is larger than {_LARGEST_MODEL:,}")
    model = BUILDERS[name](**config, input_size=size)
    if description["stage"] in ("frozen", "compact"):
        model = _reshape(model, description, size)
    return model


def _build_net(description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    model = build_graph(description["graph"], tensors)
    _set_attributes(model, description)
    if "fixed_size" in description:
        vars(model)["fixed_size"] = tuple(int(n) for n in description["fixed_size"])
    return model


def _set_attributes(model: nn.Module, description: dict[str, Any]) -> None:
    if "consensus" in description:
        vars(model)["consensus"] = _consensus(description["consensus"])
    if "mac_terms" in description:
        vars(model)["mac_terms"] = [
            MacTerm(macs, params, tuple(gates), tuple(None if c is None else tuple(c) for c in channels))
            for macs, params, gates, channels in description["mac_terms"]
        ]
    if "conversion" in description:
        vars(model)["conversion"] = Conversion(**description["conversion"])
    if "example_size" in description:
        vars(model)["gatedconv_size"] = tuple(description["example_size"])


def _consensus(stored: dict[str, Any]) -> Consensus:
    return Consensus(
        {name: torch.tensor(mask, dtype=torch.bool, device="cpu") for name, mask in stored["masks"].items()},
        stored["agreement"],
        stored["gate_agreement"],
        {name: torch.tensor(rate, device="cpu") for name, rate in stored["open_rates"].items()},
    )


def _reshape(model: nn.Module, description: dict[str, Any], input_size: tuple[int, ...]) -> nn.Module:
    stored = description.get("consensus")
    consensus = _consensus(stored) if stored else None
    frozen = freeze_gates(model, consensus.masks if consensus else {})
    if consensus is not None:
        vars(frozen)["consensus"] = consensus
    if description["stage"] == "frozen":
        return frozen
    multiple = description.get("channel_multiple", 1)
    return compact(frozen.eval(), torch.zeros(1, *input_size, device="cpu"), channel_multiple=multiple, verify=False)
