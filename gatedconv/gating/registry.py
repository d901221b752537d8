"""Finding the gates of a model; copies of it, and its modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gatedconv.gating.gates import FrozenGate, Gate

Kind = TypeVar("Kind")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel, AveragedModel or torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__module__.startswith(("torch.nn.parallel", "torch.optim.swa_utils")):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the user's own module; tensors that its last forward left in its attributes come along detached.

    Such are the weights that hooks compute (torch.nn.utils.weight_norm) and features that a model keeps.
    """
    model = unwrap(model)
    left = (t for m in model.modules() for t in tree_leaves(dict(vars(m))) if isinstance(t, Tensor) and not t.is_leaf)
    with torch.no_grad():  # TorchScript would copy its parameters differentiably
        twin = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in left})
    for mine, its in zip(twin.parameters(), model.parameters(), strict=True):
        if mine.requires_grad != its.requires_grad:
            mine.requires_grad_(its.requires_grad)
    return twin


def attribute_of(model: nn.Module, name: str, kind: type[Kind]) -> Kind | None:
    """The attribute ``name`` that this package set on a model; None if there is none, or it is the user's own."""
    found = vars(unwrap(model)).get(name)
    return found if isinstance(found, kind) else None


def require_free(model: nn.Module, name: str, kind: type, owner: str) -> None:
    """Raise ValueError, naming ``owner``, where the user's own model has an attribute that a result would replace."""
    found = getattr(unwrap(model), name, None)
    parts = found if isinstance(found, (list, tuple)) else [found]
    if found is not None and not all(isinstance(part, kind) for part in parts):
        raise ValueError(
            f"{owner}: {type(unwrap(model)).__name__} has an attribute {name!r} of its own, under which the result "
            f"would keep its {kind.__name__}; rename it"
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; then every module's flag is as it was.

    By ``train``, so that a class which does more there, such as merging weights in eval, undoes it.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            if module.training != flag:
                module.train(flag)
        for module, flag in training.items():
            module.training = flag


def find_gates(model: nn.Module) -> dict[str, Gate]:
    """All gates of a model, by module path, in module order; known before any forward.

    Exported as ``gatedconv.gates``. In our ResNets a block's gates are its submodules ``layer_gate`` and
    ``channel_gate``: "layer1.0.layer_gate". A frozen model's gates are its constants.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gates: model must be a torch.nn.Module, got {type(model).__name__}")
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, Gate)}


def require_gates(model: nn.Module, owner: str) -> dict[str, Gate]:
    """``find_gates``, but ValueError, naming ``owner``, where there are none."""
    found = find_gates(model)
    if not found:
        raise ValueError(f"{owner}: the model has no gates; build it with gate=... or use gatedconv.gate_model")
    if "" in found:
        raise ValueError(f"{owner}: expected a model that contains gates, got a {type(model).__name__} itself")
    return found


def require_frozen(model: nn.Module, owner: str) -> None:
    """Raise ValueError, naming ``owner``, where a gate of the model still learns."""
    learning = [name for name, gate in find_gates(model).items() if not isinstance(gate, FrozenGate)]
    if learning:
        raise ValueError(f"{owner}: freeze the model first; gate {learning[0]!r} is still learning")


def forget(model: nn.Module) -> None:
    """Drop what the gates of a model keep of the last call, which holds that call's autograd graph in memory.

    A network calls this before its first layer runs. When a CUDA graph is captured after eager steps, PyTorch would
    otherwise reuse the gradient accumulators of those steps, which are bound to another stream
    (pytorch/pytorch#137483). The networks of `gatedconv.models` and those that `gate_model` returns do it themselves
    in training.
    """
    if torch.compiler.is_compiling():  # a compiled graph has no such accumulators
        return
    # `modules()` takes milliseconds in a deep network. The list is not kept: gates may be replaced between calls.
    waiting, seen = [unwrap(model)], set()
    while waiting:
        module = waiting.pop()
        if isinstance(module, Gate):
            module.forget()
        elif module not in seen:
            seen.add(module)
            waiting.extend(child for child in module._modules.values() if child is not None)


def open_rates(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """Open rate (num_gates,) of each gate's last batch on this rank; ValueError before any forward."""
    rates: dict[str, Tensor] = {}
    for name, gate in require_gates(model, owner).items():
        if gate.open_rate is None:
            raise ValueError(f"{owner}: gate {name!r} has seen no batch; run a forward pass first")
        rates[name] = gate.open_rate
    return rates
