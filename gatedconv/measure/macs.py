"""Counting MACs with fvcore, which this project's figures are quoted in."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gatedconv.gating import unwrap

_CONV_AND_LINEAR = ("conv", "masked_conv2d", "linear", "addmm", "matmul")


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of one eval-mode forward on ``example_input``, by fvcore's rules.

    A convolution or linear layer counts its multiply-accumulates, a BatchNorm 2 per element, a pool 1 per
    element, ReLU and additions nothing. Our own convolution counts the open channels alone. For figures
    per image pass a single image.

    Args:
        model: any model that torch.jit can trace.
        example_input: (N, C, H, W).

    Raises:
        TypeError: for arguments of another kind.
    """
    return sum(count_macs_by_operator(model, example_input).values())


def count_macs_by_operator(model: nn.Module, example_input: Tensor) -> Counter[str]:
    """What `count_macs` adds up, by fvcore's names of the operators; see `conv_macs`.

    Raises:
        TypeError: for arguments of another kind than `count_macs` takes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count_macs: the model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"count_macs: example_input must be a tensor, got {type(example_input).__name__}")
    model = unwrap(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _fvcore_counts(model, example_input)
    finally:
        for module, flag in training.items():
            module.training = flag


def _fvcore_counts(model: nn.Module, example_input: Tensor) -> Counter[str]:
    with _quiet():  # fvcore compiles a script at import, which recent PyTorch calls deprecated
        from fvcore.nn import FlopCountAnalysis

    executed = _executed_masked_convs(model, example_input)

    def masked_conv(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return Counter({"masked_conv2d": executed.popleft()})

    analysis = FlopCountAnalysis(model, (example_input,))
    analysis.set_op_handle("gatedconv::masked_conv2d", masked_conv)
    analysis.set_op_handle("aten::_convolution_mode", _named_padding_macs)  # padding="same", which fvcore passes by
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    with _quiet(), torch.no_grad():  # with gradients the trace holds an autograd function, and no operator
        return Counter({name: int(macs) for name, macs in analysis.by_operator().items()})


def conv_macs(operators: Mapping[str, int]) -> int:
    """MACs of convolutions and linear layers alone, which is what most others count, from `count_macs_by_operator`."""
    return sum(operators.get(name, 0) for name in _CONV_AND_LINEAR)


def _named_padding_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Output elements x weights of one output channel."""
    weight, out = inputs[1].type().sizes(), outputs[0].type().sizes()
    return Counter({"conv": math.prod(out) * math.prod(weight[1:])})


def _executed_masked_convs(model: nn.Module, example_input: Tensor) -> deque[int]:
    """MACs of each masked convolution in call order.

    A traced graph holds shapes and no masks, so the counts are taken from a run on the real tensors.
    """
    recorder = _MaskedConvRecorder()
    with torch.no_grad(), recorder:
        model(example_input)
    return recorder.macs


class _MaskedConvRecorder(TorchDispatchMode):
    """Sees every call of our convolution with its actual masks."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: deque[int] = deque()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() == "gatedconv::masked_conv2d":
            bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            self.macs.append(_masked_conv_macs(bound, out))
        return out


def _masked_conv_macs(call: dict[str, Any], out: Tensor) -> int:
    """Output pixels x sum over open outputs of (open inputs of the group x kernel area)."""
    weight, groups = call["weight"], call.get("groups", 1)
    in_open = call.get("in_open")
    inputs_per_group = weight.shape[1]
    if in_open is None:
        in_counts = torch.full((groups,), inputs_per_group)
    else:
        in_counts = in_open.reshape(groups, inputs_per_group).sum(dim=1).cpu()
    out_open = call["out_open"].reshape(-1, groups, weight.shape[0] // groups).sum(dim=2).cpu()
    per_image = (out_open * in_counts).sum(dim=1) * weight.shape[2] * weight.shape[3]
    pixels = out.shape[2] * out.shape[3]
    images = per_image if per_image.numel() > 1 else per_image.expand(out.shape[0])
    return int(images.sum()) * pixels


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep tracing's deprecation and constant warnings, and fvcore's log lines, out of the user's sight."""
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
