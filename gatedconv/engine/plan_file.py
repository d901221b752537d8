"""Writes an engine's plan as the one file that gatedconv-runtime runs (csrc/cpu/plan_file.h)."""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv import _native
from gatedconv.deploy.export import About
from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.engine.engine import Engine
from gatedconv.engine.idioms import name_of
from gatedconv.engine.plan_writer import HEADER, MAP_FIELDS, STEP_FIELDS, VERSION
from gatedconv.environment import version


def write_plan(model: nn.Module, path: Path, example_input: Tensor, about: About) -> None:
    """Pack a model and write its plan.

    Args:
        model: An `Engine`, or what one is made of. A model on another device is packed for the CPU.
        path: The file to write.
        example_input: (N, C, H, W); the algorithms are chosen for this size.
        about: The network's images and classes, for the file.

    Raises:
        ValueError: A part of the network would stay in PyTorch, or `about` does not fit the network.
    """
    engine = model if isinstance(model, Engine) else Engine(model.cpu(), example_input.cpu())
    plan = _whole_plan(engine)
    if engine.fixed_size is not None and _takes_larger(plan, *engine.fixed_size):
        size = " x ".join(map(str, engine.fixed_size))
        raise ValueError(f"its plan is right for images of {size} alone, and a file takes those of any size")
    channels, outputs = engine.example_size[1], plan.shape[0]
    _check(about, channels, outputs)
    texts = {
        "format": "gatedconv.plan",
        "version": str(VERSION),
        "producer": f"gatedconv {version('gatedconv') or 'of an unknown version'}",
        "input": " ".join(map(str, engine.example_size)),
        "rank": str(plan.shape[1]),
    }
    if about.classes is not None:
        texts["classes"] = "\n".join(about.classes)
    for name, values in (("mean", about.mean), ("std", about.std)):
        if values is not None:
            texts[name] = " ".join(repr(float(value)) for value in values)
    path.write_bytes(plan_bytes(plan.program, _stored(plan), texts))
    _require_readable(path)


def plan_bytes(program: Tensor, weights: Tensor, texts: Mapping[str, str]) -> bytes:
    """Return a safetensors file of a program (int64) and stored weights (float32): the same bytes at every call.

    safetensors' own writer orders the texts differently in every process, so the header is written here.
    """
    data = program.numpy().tobytes() + weights.numpy().tobytes()
    said = b"".join(f"{key}\0{value}\0".encode() for key, value in sorted(texts.items()))
    checksum = {"checksum": f"crc32:{zlib.crc32(said + data):08x}"}
    header = {
        "__metadata__": dict(sorted({**texts, **checksum}.items())),
        "program": {"dtype": "I64", "shape": [program.numel()], "data_offsets": [0, 8 * program.numel()]},
        "weights": {"dtype": "F32", "shape": [weights.numel()], "data_offsets": [8 * program.numel(), len(data)]},
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _stored(plan: PlanModule) -> Tensor:
    """The weights without those of Winograd's algorithms, which the reader makes anew (csrc/cpu/plan_weights.h)."""
    first, last = len(HEADER) + len(MAP_FIELDS) * len(plan.maps), int(plan.program[HEADER.index("lists")])
    fields = plan.program[first:last].view(len(plan.steps), len(STEP_FIELDS))
    offsets = fields[:, STEP_FIELDS.index("weights")].tolist()
    kept, at = [], 0
    for step, offset in zip(plan.steps, offsets, strict=True):
        if step.op.startswith("winograd"):
            kept.append(plan.weights[at:offset])
            at = offset + step.weight_bytes // 4
    return torch.cat([*kept, plan.weights[at:]])


def _whole_plan(engine: Engine) -> PlanModule:
    """The plan of an engine that is nothing else."""
    if engine.device.type != "cpu":
        raise ValueError(f"a plan is packed for the CPU, and this engine for {engine.device}")
    if engine.reason is not None:
        raise ValueError(f"all of it would stay in PyTorch: {engine.reason}")
    assert isinstance(engine.body, torch.fx.GraphModule)
    calls = []
    for node in engine.body.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        module = engine.body.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, PlanModule):
            kind = type(module).__name__ if module is not None else name_of(node)
            raise ValueError(f"{node.name} ({kind}) would stay in PyTorch, and a plan holds a whole network")
        calls.append((node, module))
    (result,) = (node for node in engine.body.graph.nodes if node.op == "output")
    if len(calls) != 1 or result.args[0] is not calls[0][0]:
        raise ValueError("it returns something else than one tensor that a plan computes")
    return calls[0][1]


def _takes_larger(plan: PlanModule, channels: int, height: int, width: int) -> bool:
    """Whether a plan runs larger images; one with a linear layer over all pixels does not."""
    try:
        plan(torch.zeros(1, channels, 2 * height, 2 * width, device="cpu"))
    except ValueError:
        return False
    return True


def _check(about: About, channels: int, outputs: int) -> None:
    for name, values in (("mean", about.mean), ("std", about.std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{name}: expected a number for each of {channels} channels, got {len(values)}")
    if about.std is not None and not all(value > 0 for value in about.std):
        raise ValueError(f"std: expected positive numbers, got {tuple(about.std)}")
    names: Sequence[Any] = about.classes or ()
    if about.classes is not None and len(names) != outputs:
        raise ValueError(f"classes: expected a name for each of {outputs} outputs, got {len(names)}")
    for name in names:
        if not isinstance(name, str) or any(c in name for c in "\n\0"):
            raise ValueError(f"classes: expected names of one line, got {name!r}")


def _require_readable(path: Path) -> None:
    """Open the file as the runtime does: what its reader refuses, too large a network for example, is not kept."""
    library = ctypes.CDLL(str(_native.load("cpu").path))
    library.gatedconv_plan_open.restype = ctypes.c_void_p
    library.gatedconv_plan_error.restype = ctypes.c_char_p
    library.gatedconv_plan_close.argtypes = [ctypes.c_void_p]
    plan = library.gatedconv_plan_open(str(path).encode())
    if not plan:
        raise ValueError(library.gatedconv_plan_error().decode(errors="replace"))
    library.gatedconv_plan_close(plan)
