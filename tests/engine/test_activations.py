"""Activations of the native plan: units in the last place against float64, NaN and infinities as PyTorch has them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from tests.engine.nets import ISAS, supported

# Reference in float64 and the most units in the last place that csrc/cpu/activations.h states.
ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu, 0),
    "relu6": (nn.ReLU6(), F.relu6, 0),
    "leaky_relu": (nn.LeakyReLU(0.25), lambda x: F.leaky_relu(x, 0.25), 1),
    "elu": (nn.ELU(), F.elu, 1),
    "silu": (nn.SiLU(), lambda x: x * torch.sigmoid(x), 2),
    "hard_swish": (nn.Hardswish(), F.hardswish, 2),
    "hard_sigmoid": (nn.Hardsigmoid(), F.hardsigmoid, 2),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid, 2),
    "tanh": (nn.Tanh(), torch.tanh, 2),
    "mish": (nn.Mish(), lambda x: x * _mish_factor(x), 2),
    "gelu": (nn.GELU(), lambda x: 0.5 * x * torch.erfc(-x / 2**0.5), 7),
    "gelu_tanh": (nn.GELU("tanh"), lambda x: _gelu_tanh(x), 3),
}
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 88.9, -88.9, -103.5, 700.0]


def _gelu_tanh(x):
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def _mish_factor(x):
    e = torch.exp(-x.abs())
    up = torch.where(x < 0, e * (e + 2), 1 + 2 * e)
    return up / (up + torch.where(x < 0, torch.full_like(x, 2.0), 2 * e * e))


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if not supported(request.param):
        pytest.skip(f"no {request.param} here")
    monkeypatch.setenv("GATEDCONV_ISA", request.param)
    return request.param


def run(module, values):
    """A plan of an identity convolution and the activation over a vector of values."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    net = nn.Sequential(conv, module)
    engine = gatedconv.Engine(net, torch.zeros(1, 1, 1, 8))
    assert "Nothing is left to PyTorch" in engine.describe()
    return engine(values.view(1, 1, 1, -1)).view(-1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_error_in_units_in_the_last_place(isa, name):
    module, reference, limit = ACTIVATIONS[name]
    near, far = torch.linspace(-20, 20, 100_001), torch.linspace(-100, 100, 50_001)
    small = torch.cat([torch.logspace(-30, 0, 20_001), -torch.logspace(-30, 0, 20_001)])
    x = torch.cat([near, far, small]).float()
    result, exact = run(module, x).double(), reference(x.double())
    kept = exact.abs() >= 1e-36  # below, a factor may be a subnormal number, which has fewer digits
    if name == "gelu_tanh":
        tail = kept & (x < -1)
        assert float(((result - exact).abs() / exact.abs())[tail].max()) <= 2e-5
        kept &= x >= -1
    result, exact = result[kept], exact[kept]
    unit = torch.from_numpy(np.spacing(np.maximum(exact.abs().numpy().astype(np.float32), np.float32(1e-45))))
    assert float(((result - exact).abs() / unit.double()).max()) <= limit


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_infinities_and_signs_of_zero(isa, name):
    module = ACTIVATIONS[name][0]
    x = torch.tensor(SPECIAL)
    result, expected = run(module, x), module(x.double()).float()
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert torch.allclose(result[finite], expected[finite], rtol=1e-5, atol=1e-30)
