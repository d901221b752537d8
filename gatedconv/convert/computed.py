"""Layers whose weights are computed in every forward: weight norm, spectral norm, parametrizations; and hooks."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def is_conv(module: nn.Module | None) -> bool:
    """Whether the module is a ``torch.nn.Conv2d``, its weights computed or not, and no other subclass."""
    return _is_exactly(module, nn.Conv2d)


def is_linear(module: nn.Module | None) -> bool:
    """Whether the module is a ``torch.nn.Linear``, its weights computed or not, and no other subclass."""
    return _is_exactly(module, nn.Linear)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether someone's hook may change what the module takes or returns."""
    before = module._forward_pre_hooks.values()
    return bool(module._forward_hooks) or any(not isinstance(hook, (WeightNorm, SpectralNorm)) for hook in before)


@torch.no_grad()
def settle_weights(model: nn.Module) -> None:
    """Make plain parameters of all computed weights, as they are in eval mode; in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _settle_parametrized(module)
        for hook in list(module._forward_pre_hooks.values()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, but models have it
                if isinstance(hook, WeightNorm):
                    remove_weight_norm(module, hook.name)
                elif isinstance(hook, SpectralNorm):
                    remove_spectral_norm(module, hook.name)


def _settle_parametrized(module: nn.Module) -> None:
    """What ``remove_parametrizations`` does; that takes the property off a class which copies share."""
    training = module.training
    module.eval()  # spectral norm moves its estimate in training
    parametrized = dict(module.parametrizations.items())  # type: ignore[operator,union-attr]
    values = {name: getattr(module, name).detach().clone() for name in parametrized}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__mro__[1]
    for name, value in values.items():
        learned = any(p.requires_grad for p in parametrized[name].parameters())
        module.register_parameter(name, nn.Parameter(value, learned))
    module.train(training)


def _is_exactly(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    if type(module) is kind:
        return True
    return isinstance(module, kind) and parametrize.is_parametrized(module) and type(module).__mro__[1] is kind
