"""Activations of the native plan: units in the last place against float64, NaN and infinities as PyTorch has them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from tests.tolerances import EACH_VALUE

# Reference in float64 and the most units in the last place that csrc/cpu/activations.h states.
ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu, 0),
    "relu6": (nn.ReLU6(), F.relu6, 0),
    "leaky_relu": (nn.LeakyReLU(0.25), lambda x: F.leaky_relu(x, 0.25), 1),
    "elu": (nn.ELU(), F.elu, 1),
    "elu_alpha": (nn.ELU(0.7), lambda x: F.elu(x, 0.7), 2),
    "silu": (nn.SiLU(), lambda x: x * torch.sigmoid(x), 2),
    "hard_swish": (nn.Hardswish(), F.hardswish, 2),
    "hard_sigmoid": (nn.Hardsigmoid(), F.hardsigmoid, 2),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid, 2),
    "tanh": (nn.Tanh(), torch.tanh, 2),
    "mish": (nn.Mish(), lambda x: x * _mish_factor(x), 2),
    "gelu": (nn.GELU(), lambda x: 0.5 * x * torch.erfc(-x / 2**0.5), 2),
    "gelu_tanh": (nn.GELU("tanh"), lambda x: _gelu_tanh(x), 2),
}
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 88.9, -88.9, -103.5, 700.0]


def _gelu_tanh(x):
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def _mish_factor(x):
    e = torch.exp(-x.abs())
    up = torch.where(x < 0, e * (e + 2), 1 + 2 * e)
    return up / (up + torch.where(x < 0, torch.full_like(x, 2.0), 2 * e * e))


def run(module, values):
    """A plan of an identity convolution and the activation over a vector of values, as a map of 1024 a row."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    net = nn.Sequential(conv, module)
    engine = gatedconv.Engine(net, torch.zeros(1, 1, 1, 8))
    assert "Nothing is left to PyTorch" in engine.describe()
    map_ = F.pad(values, (0, -len(values) % 1024)).view(1, 1, -1, 1024)
    return engine(map_).view(-1)[: len(values)]


def floats(stride):
    """Every `stride`-th of the finite floats, by their bits."""
    bits = torch.arange(0, 0x7F800000, stride, dtype=torch.int32)
    return torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])


def units_of_error(name, x):
    """The most units in the last place by which the plan misses float64, where that is at least 1e-36.

    Below, a factor may be a subnormal number, which has fewer digits.
    """
    module, reference, _ = ACTIVATIONS[name]
    result, exact = run(module, x).double(), reference(x.double())
    kept = exact.abs() >= 1e-36
    result, exact = result[kept], exact[kept]
    unit = torch.from_numpy(np.spacing(exact.abs().numpy().astype(np.float32)))
    return float(((result - exact).abs() / unit.double()).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_error_in_units_in_the_last_place(isa, name):
    # Where the kernels change their formula, clip, or cancel, and next to zero.
    critical = torch.tensor([0.003, 0.03, 0.063, 0.625, 1, 3, 5.64, 6, 9.7, 10, 12.7, 13.25, 83, 87, 88])
    bits = critical.view(torch.int32)[:, None] + torch.arange(-2000, 2000, dtype=torch.int32)
    near = bits.flatten().view(torch.float32)
    x = torch.cat([torch.linspace(-20, 20, 100_001), near, -near, floats(20_011)])
    assert units_of_error(name, x) <= ACTIVATIONS[name][2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_error_of_every_997th_float(isa, name):
    assert units_of_error(name, floats(997)) <= ACTIVATIONS[name][2]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_infinities_and_signs_of_zero(isa, name):
    module = ACTIVATIONS[name][0]
    x = torch.tensor(SPECIAL)
    result, expected = run(module, x), module(x.double()).float()
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert torch.allclose(result[finite], expected[finite], **EACH_VALUE)
