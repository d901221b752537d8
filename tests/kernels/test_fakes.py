"""Shapes, strides and dtypes that the operators promise a compiled graph are those that their launchers give it."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from gatedconv import ops
from tests.kernels.recording import recorded
from tests.ops.gate_oracle import gate_op, residual_op
from tests.ops.test_gate import make, operator_arguments
from tests.ops.test_gated_residual import residual_arguments

pytest.importorskip("triton")
gated_scale = importlib.import_module("gatedconv.ops.gated_scale")  # the package's attribute is the function
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")

LAYOUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "crop": lambda x: x[:, :, 1:, 1:],
    "transposed": lambda x: x.transpose(2, 3),
    "every second channel": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
}


def assert_promise_kept(launcher, fake, arguments):
    """Run the launcher, and the fake on fake tensors; return what the launcher gave."""
    with recorded():
        real = launcher(*arguments)
    mode = FakeTensorMode()
    with mode:
        promised = fake(*tree_map(lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, arguments))
    real_list, promised = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (real, promised))
    assert len(real_list) == len(promised)
    for i, (got, said) in enumerate(zip(real_list, promised, strict=True)):
        assert got.shape == said.shape and got.dtype == said.dtype, i
        assert got.numel() == 0 or got.stride() == said.stride(), (i, got.stride(), said.stride())
    return real


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("hidden", [4, None])
@pytest.mark.parametrize("need_dx", [True, False])
def test_gate(layout, flatten, hidden, need_dx):
    x = LAYOUTS[layout](torch.randn(6, 4, 3, 5)).half()
    features = x[0].numel() if flatten else x.shape[1]
    parameters, statistics = make(features, hidden)
    options = ops.GateOptions("batch_mean", flatten=flatten)
    arguments = operator_arguments(x, parameters, statistics, options)
    out = assert_promise_kept(gate_op._forward_kernels, gate_op._forward_fake, arguments)
    gate, rate, logits, pooled, *saved = out
    weights = (parameters.weight1, parameters.norm_weight, parameters.norm_bias, parameters.weight2)
    backward = (
        gate,
        rate,
        None,
        x if flatten else pooled,
        logits,
        *saved,
        *weights,
        None,
        1 if flatten else 15,
        need_dx,
        "batch_mean",
        1.0,
        True,
        True,
        x.dtype,
    )
    assert_promise_kept(gate_op._backward_kernels, gate_op._backward_fake, backward)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gates", ["layer", "1fc", "2fc", "both"])
def test_gated_residual(layout, gates):
    arguments, backward = residual_arguments(gates, LAYOUTS[layout], torch.float32)
    out = assert_promise_kept(residual_op._forward_kernels, residual_op._forward_fake, arguments)
    assert_promise_kept(residual_op._backward_kernels, residual_op._backward_fake, backward(out))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gated_scale(layout):
    x, gate = LAYOUTS[layout](torch.randn(6, 4, 3, 5)).half(), torch.ones(6, 4)
    gate = gate[:, : LAYOUTS[layout](torch.randn(6, 4, 3, 5)).shape[1]]
    out = assert_promise_kept(gated_scale._forward_kernel, gated_scale._forward_fake, (x, gate))
    assert_promise_kept(gated_scale._backward_kernel, gated_scale._backward_fake, (out, x, gate))
