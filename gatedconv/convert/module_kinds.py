"""Kinds of modules: which a record takes for one layer, and which have torch.nn's own class, weights and hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gatedconv.gating import Gate

CONVS = (nn.Conv2d, nn.ConvTranspose2d)
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict")


def is_exact(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module is of one of these very classes, its weights computed by a parametrization or not."""
    return (type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)) in kinds


def groups_of(module: nn.Module | None) -> int:
    """The groups of a convolution or a group norm; 1 for a linear layer."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, CONVS) else 1


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether each output of a convolution reads one channel."""
    return isinstance(module, CONVS) and module.groups == module.in_channels and module.groups > 1


def has_numbers(module: nn.Module | None, channels: int) -> bool:
    """Whether a module has parameters or buffers for each of the channels that it returns."""
    if module is None or isinstance(module, (*CONVS, nn.Linear, nn.GroupNorm)):
        return module is not None
    return any(t.dim() and t.shape[0] == channels for t in (*module.parameters(), *module.buffers()))


def is_known_transposed(module: nn.Module) -> bool:
    """Whether a transposed convolution has torch.nn's own code, and either no groups or one for each channel."""
    if not isinstance(module, nn.ConvTranspose2d) or not is_exact(module, nn.ConvTranspose2d):
        return False
    return module.groups == 1 or module.groups == module.in_channels == module.out_channels


def is_swapped(layer: nn.Module) -> bool:
    """Whether a layer's weight is (C_in, C_out, ...): that of a transposed convolution without groups."""
    return isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer as (C_out, C_in / groups, ...)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.transpose(0, 1) if is_swapped(layer) else weight


def is_computed(module: nn.Module) -> bool:
    """Whether a layer's weights are computed in every forward: weight norm, spectral norm, parametrizations."""
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(isinstance(h, (WeightNorm, SpectralNorm)) for h in hooks)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a hook of someone else may change what the module takes or returns."""

    def foreign(hook: Any) -> bool:
        return not isinstance(hook, (WeightNorm, SpectralNorm)) and not getattr(hook, "of_gatedconv", False)

    return any(map(foreign, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def is_known(module: nn.Module) -> bool:
    """Whether a call of the module is one operation of the record."""
    if isinstance(module, (Gate, nn.Conv2d, nn.Linear)) and not isinstance(module, nn.LazyLinear):
        return True
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
    if kind.__module__.startswith("gatedconv.nn.") and kind.__name__ not in (
        "BasicBlock",
        "CompactBlock",
        "GraphNet",
        "Framed",
    ):
        return True
    if not kind.__module__.startswith("torch.nn.modules.") or kind.__name__ in _CONTAINERS:
        return False
    return kind is not nn.Module and "transformer" not in kind.__module__
