"""Layers with fewer channels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.canonical import bind_functional, submodule
from gatedconv.deploy.cut.facts import Facts


@dataclass(eq=False)
class Dense:
    """The numbers of a convolution or linear layer, written as a module or as a function."""

    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: Any
    padding: Any
    dilation: Any
    padding_mode: str
    trainable: bool

    @property
    def is_padded(self) -> bool:
        """Whether zeros around the image take part."""
        if self.padding_mode != "zeros" or self.padding == "valid":
            return False
        if self.padding == "same":
            return any(k > 1 for k in self.weight.shape[2:])
        return any(p > 0 for p in (self.padding if isinstance(self.padding, (tuple, list)) else [self.padding]))


def read_dense(node: fx.Node, facts: Facts) -> Dense:
    """The layer of a conv or linear node."""
    module = submodule(node)
    if isinstance(module, nn.Conv2d):
        return Dense(module.weight, module.bias, module.groups, module.stride, module.padding, module.dilation,
                     module.padding_mode, module.weight.requires_grad)  # fmt: skip
    if isinstance(module, nn.Linear):
        return Dense(module.weight, module.bias, 1, 1, 0, 1, "zeros", module.weight.requires_grad)
    arguments = bind_functional(node)
    bias = None if arguments["bias"] is None else facts.constant(arguments["bias"])
    return Dense(facts.constant(arguments["weight"]), bias, arguments["groups"], arguments["stride"],
                 arguments["padding"], arguments["dilation"], "zeros", True)  # fmt: skip


@torch.no_grad()
def build_dense(layer: Dense, weight: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Module:
    """A ``torch.nn`` layer like ``layer`` with the given (cut) weight and bias."""
    module: nn.Linear | nn.Conv2d
    if weight.dim() == 2:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    else:
        geometry: tuple[Any, Any, Any, Any] = (tuple(weight.shape[2:]), layer.stride, layer.padding, layer.dilation)
        padding_mode: Any = layer.padding_mode
        module = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], *geometry, groups, bias is not None, padding_mode,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
    module.weight.copy_(weight)
    if bias is not None and module.bias is not None:
        module.bias.copy_(bias)
    return module.requires_grad_(layer.trainable)


@torch.no_grad()
def constant_share(weight: Tensor, values: Tensor) -> Tensor:
    """What inputs of constant value add to each output: weight (O, K, ...), values (K,) -> (O,)."""
    share = (weight.flatten(2).sum(dim=2) if weight.dim() > 2 else weight).double() @ values.double()
    return share.to(weight.dtype)


@torch.no_grad()
def cut_channelwise(module: nn.Module, index: Tensor, size: int) -> nn.Module:
    """A module with a number per channel, with the channels of ``index`` alone."""
    numbers = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not any(value.dim() and value.shape[0] == size for value in numbers):
        return module
    result = copy.copy(module)
    result._parameters, result._buffers = dict(module._parameters), dict(module._buffers)
    for name, value in module._parameters.items():
        if value is not None and value.dim() and value.shape[0] == size:
            result._parameters[name] = nn.Parameter(value.index_select(0, index), value.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim() and buffer.shape[0] == size:
            result._buffers[name] = buffer.index_select(0, index)
    for attribute in ("num_features", "num_parameters"):
        if getattr(module, attribute, None) == size:
            setattr(result, attribute, len(index))
    return result


@torch.no_grad()
def fold_scale(module: nn.Module, scale: Tensor) -> bool:
    """Multiply a layer's output channels by constants, inside the layer; False where it has no way to."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
        module.weight = nn.Parameter(module.weight * scale, module.weight.requires_grad)
        module.bias = nn.Parameter(module.bias * scale, module.bias.requires_grad)
        return True
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        shaped = scale.reshape(-1, *[1] * (module.weight.dim() - 1))
        module.weight = nn.Parameter(module.weight * shaped, module.weight.requires_grad)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias * scale, module.bias.requires_grad)
        return True
    return False


def pad_with_ones(weight: Tensor, absorbed: Tensor, values: Tensor) -> Tensor:
    """Weight (O, K, h, w) with one more input, of ones, that stands for the constants ``values``."""
    summed = torch.einsum("okhw,k->ohw", absorbed.double(), values.double()).to(weight.dtype)
    return torch.cat([weight, summed[:, None]], dim=1)


__all__ = [
    "Dense",
    "build_dense",
    "constant_share",
    "cut_channelwise",
    "fold_scale",
    "pad_with_ones",
    "read_dense",
]
