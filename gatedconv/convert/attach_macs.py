"""``attach_macs``: the MACs that each gate controls, for models with gates of the user's own."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from gatedconv.convert.example import record_example, require_example
from gatedconv.convert.flow import Flow
from gatedconv.convert.gate_model import total_macs
from gatedconv.convert.install import BeforeForward, repeated_gates
from gatedconv.convert.mac_trial import estimated_parts
from gatedconv.convert.module_kinds import is_computed
from gatedconv.convert.record import Value
from gatedconv.convert.record_macs import GatePlaces, merge_terms, node_terms
from gatedconv.gating import FrozenGate, Gate, MacTerm, copied, require_free, unwrap
from gatedconv.gating.registry import require_gates
from gatedconv.nn import Conv2d


@torch.no_grad()
def attach_macs(model: nn.Module, example_input: Any) -> None:
    """Count the MACs that each gate controls, in a model in which ``gatedconv.Conv2d`` replaces ``torch.nn.Conv2d``.

    `GatePruner` and the losses on MACs need them. A copy of the model runs once; the model's attribute ``mac_terms`` is
    set. Models of ``gatedconv.models`` and of ``gate_model`` have it already.

    Args:
        model: its gates are those of ``gatedconv.Conv2d`` layers, none frozen.
        example_input: as of ``gate_model``; MACs are counted at its size.

    Warns:
        UserWarning: where MACs can only be estimated, naming the layers.

    Raises:
        TypeError: the model is no torch.nn.Module, or the example no input.
        ValueError: the model has no gates, or other gates; a gated layer is of a subclass, has computed weights (weight
            norm, parametrizations), shares its gate, or does not run; or the model does not run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach_macs: model must be a torch.nn.Module, got {type(model).__name__}")
    require_free(model, "mac_terms", MacTerm, "attach_macs")
    example_input, model = require_example(example_input, "attach_macs"), unwrap(model)
    gated = _gated_layers(model)
    plain = copied(model)
    for path in gated:
        layer = plain.get_submodule(path)
        del layer.gate
        layer.__class__ = nn.Conv2d
    record = record_example(plain, example_input, "attach_macs", model)
    flow, values = Flow(record), dict[Value, tuple[str, int]]()
    for path, channels in gated.items():
        if not record.calls_of(path):
            raise ValueError(f"attach_macs: {path!r} does not run on the example")
        values.update((call.outputs[0], (f"{path}.gate", channels)) for call in record.calls_of(path))
    places = GatePlaces(values, {}, {})
    terms = node_terms(flow, places)
    total, _ = total_macs(plain, example_input)
    for path in gated:
        model.get_submodule(path).gate.calls = len(record.calls_of(path))  # type: ignore[union-attr]
    if repeated := repeated_gates(model):
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, BeforeForward):  # of MACs that were attached before
                del model._forward_pre_hooks[key]
        model.register_forward_pre_hook(BeforeForward([], repeated))
    vars(model)["mac_terms"] = merge_terms((term for of_node in terms.values() for term in of_node), total)
    if estimated := estimated_parts(flow, places, terms):
        warnings.warn(f"attach_macs: the MACs of {', '.join(sorted(estimated))} are estimates", stacklevel=3)


def _gated_layers(model: nn.Module) -> dict[str, int]:
    """The paths of the gated layers, and their numbers of channels."""
    gated = {}
    held = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False) if isinstance(module, Gate))
    for name, gate in require_gates(model, "attach_macs").items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if not isinstance(owner, Conv2d) or attribute != "gate":
            raise ValueError(f"attach_macs: expected gates of gatedconv.Conv2d alone, found {name!r}")
        if type(owner) is not Conv2d or is_computed(owner):
            kind = "has weights that are computed" if is_computed(owner) else f"is a {type(owner).__name__}"
            raise ValueError(f"attach_macs: expected gatedconv.Conv2d itself at {path!r}, which {kind}")
        if held[id(gate)] > 1:
            raise ValueError(f"attach_macs: the gate {name!r} is in several layers; expected one for each")
        if isinstance(gate, FrozenGate):
            raise ValueError(f"attach_macs: the gate {name!r} is frozen; attach MACs before you freeze")
        gated[path] = owner.out_channels
    return gated
