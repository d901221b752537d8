"""MACs by fvcore's rules, in which this project's figures are given, and those of attention and recurrent layers."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gatedconv.gating import eval_mode, unwrap
from gatedconv.gating.mac_terms import dense_macs
from gatedconv.ops._masked_conv2d_args import executed_macs

_CONV_AND_LINEAR = ("conv", "masked_conv2d", "linear", "addmm", "matmul")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of one eval-mode forward on ``example_input``, by fvcore's rules.

    A convolution, a linear or recurrent layer and attention count their multiply-accumulates, a BatchNorm 2 per
    element, a pool 1 per element, ReLU and additions nothing. Our own convolution counts the open channels alone.
    For figures per image pass a single image.

    Args:
        model: any model that torch.jit can trace.
        example_input: (N, C, H, W).

    Raises:
        TypeError: for arguments of another kind.
        Exception: what torch.jit.trace raises for a model that it cannot trace.
    """
    return sum(count_macs_by_operator(model, example_input).values())


def count_macs_by_operator(model: nn.Module, example_input: Tensor) -> Counter[str]:
    """The terms of `count_macs`, by fvcore's names of the operators; see `conv_and_linear_macs`.

    Raises:
        TypeError: for arguments of another kind than `count_macs` takes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count_macs: the model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"count_macs: example_input must be a tensor, got {type(example_input).__name__}")
    model = unwrap(model)
    if getattr(type(model), "hides_layers", False) is True:
        raise TypeError("count_macs: an Engine's plan hides its layers; count the compact model that it was made of")
    with eval_mode(model):
        return _fvcore_counts(model, example_input.clone())  # some code changes its input


def _fvcore_counts(model: nn.Module, example_input: Tensor) -> Counter[str]:
    with _quiet():  # fvcore compiles a script at import, which recent PyTorch calls deprecated
        from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, (example_input,))
    analysis.set_op_handle("gatedconv::masked_conv2d", None)  # a trace has no masks
    analysis.set_op_handle("aten::_convolution_mode", _named_padding_macs)  # padding="same", unknown to fvcore
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    analysis.set_op_handle("aten::baddbmm", lambda inputs, outputs: _product_macs(inputs[1], inputs[2], "matmul"))
    for name in _RECURRENT:
        analysis.set_op_handle(f"aten::{name}", partial(_recurrent_macs, name))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    # With gradients the trace has an autograd function instead of the operator, under autocast a copy of each weight.
    device = example_input.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    uncached = torch.autocast(device, dtype, enabled, cache_enabled=False)
    with _quiet(), torch.no_grad(), uncached, _attention_in_parts():
        counts = Counter({name: int(macs) for name, macs in analysis.by_operator().items()})
    if executed := _executed_masked_convs(model, example_input):
        counts["masked_conv2d"] = executed
    return counts


def conv_and_linear_macs(operators: Mapping[str, int]) -> int:
    """MACs of convolutions and linear layers alone, as most papers count, from `count_macs_by_operator`."""
    return sum(operators.get(name, 0) for name in _CONV_AND_LINEAR)


def _named_padding_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter({"conv": dense_macs(outputs[0].type().sizes(), inputs[1].type().sizes())})


def _sizes(value: Any) -> list[int]:
    sizes: list[int] = value.type().sizes()
    return sizes


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Of queries (..., L, E), keys (..., S, E) and values (..., S, V): L * S * (E + V) each."""
    queries, keys, values = (_sizes(value) for value in inputs[:3])
    return Counter({"attention": math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])})


def _product_macs(left: Any, right: Any, name: str) -> Counter[str]:
    return Counter({name: math.prod(_sizes(left)) * _sizes(right)[-1]})


def _recurrent_macs(name: str, inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Every step of every sequence multiplies by each weight matrix once."""
    parameters = next(value for value in reversed(inputs) if value.node().kind() == "prim::ListConstruct")
    weights = [_sizes(weight) for weight in parameters.node().inputs()]
    return Counter({name: math.prod(_sizes(inputs[0])[:-1]) * sum(math.prod(s) for s in weights if len(s) == 2)})


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """nn.MultiheadAttention as linear layers and attention, not as the one operator that it is in eval mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _executed_masked_convs(model: nn.Module, example_input: Tensor) -> int:
    """MACs of all masked convolutions in a run on the real tensors."""
    recorder = _MaskedConvRecorder()
    with torch.no_grad(), recorder:
        model(example_input)
    return recorder.macs


class _MaskedConvRecorder(TorchDispatchMode):
    """Adds up the calls of our convolution with their actual masks."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() == "gatedconv::masked_conv2d":
            call = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            masks = call["out_open"], call["in_open"]
            self.macs += executed_macs(call["weight"], *masks, call["groups"], out.shape)
        return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress deprecation and constant warnings of tracing, and fvcore's log lines."""
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
