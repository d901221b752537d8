"""How one layer loses channels: its weights, its numbers for each channel, and the counts that go with them.

Which channels those are, through sums and concatenations, is solved in ``convert.channels``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gatedconv.convert.module_kinds import CONVS, is_computed, is_swapped
from gatedconv.nn.modules import take_place

_COUNTS = "in_channels out_channels groups in_features out_features num_features num_parameters num_channels num_groups"
COUNTS = tuple(_COUNTS.split())


def filled_up(mask: Tensor, channel_multiple: int) -> Tensor:
    """Bool (C,): the open channels and, where there are any, the first closed ones, to a multiple as far as C goes."""
    kept = mask.clone()
    if bool(mask.any()):
        kept[(~mask).nonzero().flatten()[: -int(mask.sum()) % channel_multiple]] = True
    return kept


def plain_conv(module: nn.Conv2d) -> nn.Conv2d:
    """A ``torch.nn.Conv2d`` that shares the parameters, hooks and children of a convolution of ours.

    Weights that hooks or parametrizations compute become parameters, without what computed them.
    """
    geometry: tuple[Any, Any, Any, Any] = (module.kernel_size, module.stride, module.padding, module.dilation)
    plain = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        *geometry,
        module.groups,
        bias=False,
        padding_mode=module.padding_mode,
        device="meta",
    )
    take_place(plain, module)
    if is_computed(module):
        plain._forward_pre_hooks, kept = OrderedDict(), module._forward_pre_hooks
        learns = any(p.requires_grad for name, p in module.named_parameters() if not name.startswith(("gate", "bias")))
        for key, hook in kept.items():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                hook(module, ())  # the weight is that of the last forward, and a state dict may have come since
            else:
                plain._forward_pre_hooks[key] = hook
        plain.weight = nn.Parameter(module.weight.detach().clone(), learns)
        bias = module.bias
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return plain.train(module.training)
    plain.weight, plain.bias = module.weight, module.bias
    plain._modules.update({name: child for name, child in module._modules.items() if name != "gate"})
    return plain.train(module.training)


def set_weight(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, weight: Tensor, groups: int = 1) -> None:
    """Give a layer a copy of a weight (C_out, C_in / groups, ...) of another size, and the counts that go with it."""
    own = weight.transpose(0, 1).contiguous() if is_swapped(layer) else weight
    layer.weight = nn.Parameter(own.detach().clone(), layer.weight.requires_grad)
    if isinstance(layer, CONVS):
        layer.in_channels, layer.out_channels, layer.groups = weight.shape[1] * groups, len(weight), groups
    else:
        layer.in_features, layer.out_features = weight.shape[1], len(weight)


def slice_numbers(module: nn.Module, kept: Tensor) -> None:
    """Give a norm or the like its parameters and buffers of the channels ``kept``, bool (C,), alone.

    Of a group norm these are those of whole groups.
    """
    size = len(kept)
    if isinstance(module, nn.GroupNorm) and module.num_channels == size:
        module.num_groups = module.num_groups * int(kept.sum()) // size
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() and parameter.shape[0] == size:
            small = parameter.detach()[kept.to(parameter.device)]
            module._parameters[name] = nn.Parameter(small, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim() and buffer.shape[0] == size:
            module._buffers[name] = buffer[kept.to(buffer.device)]
    for attribute in ("num_features", "num_parameters", "num_channels"):
        if getattr(module, attribute, None) == size:
            setattr(module, attribute, int(kept.sum()))


def zero_channels(module: nn.Module, closed: Tensor) -> None:
    """Zero weight and bias at ``closed``, bool (C,), so that these outputs are 0; the parameters are replaced."""
    for name in ("weight", "bias"):
        parameter = getattr(module, name)
        if parameter is not None:
            changed = parameter.detach().clone()
            rows = changed if name == "bias" else changed.transpose(0, 1) if is_swapped(module) else changed
            rows[closed.to(changed.device)] = 0
            setattr(module, name, nn.Parameter(changed, parameter.requires_grad))
