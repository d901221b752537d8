"""Channel gates without a graph: the Conv2d layers of a model are swapped for gated ones, its code stays."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from gatedconv.convert.canonical import set_module
from gatedconv.convert.conversion import Conversion, Selection
from gatedconv.convert.sites import open_gate
from gatedconv.gating import ChannelGate
from gatedconv.nn import Conv2d


def swap_modules(
    model: nn.Module,
    selection: Selection,
    gate: str,
    position: str,
    estimator: str,
    example_input: Tensor,
    why: str,
) -> nn.Module:
    """``model`` itself with ``gatedconv.Conv2d`` in place of its convolutions, and ``conversion`` on it.

    Raises:
        ValueError: where a layer gate was asked for, or nothing can be swapped.
    """
    if gate == "layer":
        raise ValueError(f"gate_model: layer gates need the model's graph, which cannot be had ({why})")
    conversion = Conversion("modules", note=f"no graph, Conv2d layers are gated one by one: {why}")
    calls = _calls(model, example_input)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Conv2d):
            continue
        reason = selection.reason(name, module)
        if type(module) is not nn.Conv2d:
            reason = reason or f"a {type(module).__name__}, whose code is its own"
        elif calls[name] != 1:
            reason = reason or f"called {calls[name]} times"
        elif not module.weight.requires_grad:
            reason = reason or "its weights are frozen (requires_grad=False)"
        if reason:
            conversion.skipped[name] = reason
            continue
        set_module(model, name, _gated(module, estimator))
        conversion.gated[f"{name}.gate"] = f"the output channels of {name}"
    if not conversion.gated:
        raise ValueError(f"gate_model: nothing to gate: {conversion}")
    model.conversion = conversion  # type: ignore[assignment]
    return model


def _gated(module: nn.Conv2d, estimator: str) -> Conv2d:
    gate = ChannelGate(module.out_channels, estimator=estimator)
    open_gate(gate)
    gated = Conv2d(
        module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,  # type: ignore[arg-type]
        module.dilation, module.groups, False, module.padding_mode, device="meta", gate=None,  # type: ignore[arg-type]
    )  # fmt: skip
    gated.weight, gated.bias = module.weight, module.bias
    gated.gate = gate.to(module.weight.device)
    return gated.train(module.training)


@torch.no_grad()
def _calls(model: nn.Module, example_input: Tensor) -> Counter[str]:
    """How often one forward calls each convolution."""
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda m, a, o, name=name: counts.update([name]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()(example_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    return counts
