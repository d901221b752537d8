"""Finding the gates of a model."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gatedconv.gating.closed_form import cached
from gatedconv.gating.gate import Gate

# Of each model: the gates' open rates of the last batch, and what `gates.losses` made of them over all processes.
joined_rates: WeakKeyDictionary[nn.Module, tuple[tuple[Tensor, ...], dict[str, Tensor]]] = WeakKeyDictionary()


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__module__.startswith("torch.nn.parallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


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
        raise ValueError(
            f"{owner}: the model has no gates; build it with gate=... or use gatedconv.gate_model"
        )
    if "" in found:
        raise ValueError(
            f"{owner}: expected a model that contains gates, got a {type(model).__name__} itself"
        )
    return found


def forget(model: nn.Module) -> None:
    """Let all gates of a model drop what they hold of the last call: it keeps that call's autograd graph alive.

    A network has to do so before its first layer runs. Where a CUDA graph is captured after eager steps, PyTorch would
    otherwise go on with the gradient accumulators of those steps, which are bound to another stream. Our ResNets and
    what `gate_model` returns do it by themselves in training.
    """
    if torch.compiler.is_compiling():  # a compiled graph has no such accumulators
        return
    joined_rates.pop(unwrap(model), None)
    # Looked for once: walking all modules takes milliseconds.
    for gate in cached(model, "gates", lambda: [module for module in model.modules() if isinstance(module, Gate)]):
        gate.forget()


def open_rates(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """Open rate (num_gates,) of each gate's last batch on this rank; ValueError before any forward."""
    rates: dict[str, Tensor] = {}
    for name, gate in require_gates(model, owner).items():
        if gate.open_rate is None:
            raise ValueError(f"{owner}: gate {name!r} has seen no batch; run a forward pass first")
        rates[name] = gate.open_rate
    return rates
