"""The gate's kernels against the fp64 reference, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from gatedconv.kernels import gate as gate_kernels

from gatedconv import ops
from tests.kernels.interpreted.compare import Case, assert_close, buffer, leaf

NAMES = ("weight1", "bias1", "norm_weight", "norm_bias", "weight2", "bias2")


def make(device, features, hidden, gates):
    """Parameters and statistics of a gate whose logits fall on both sides of 0 and of the window."""
    draw = lambda *shape: 0.4 * torch.randn(*shape).to(device)  # noqa: E731
    first = (draw(hidden, features), draw(hidden), 1 + draw(hidden), draw(hidden)) if hidden else (None,) * 4
    parameters = ops.GateParameters(*first, draw(gates, hidden or features), draw(gates))
    norm = (draw(hidden), 1 + draw(hidden).abs(), torch.tensor(3, device=device)) if hidden else (None,) * 3
    return parameters, ops.GateStatistics(*norm, torch.rand(gates).to(device), draw(gates))


def run(function, exact, x, parameters, statistics, options, noise=None, parts=("gate", "open_rate", "logits")):
    x, parameters = leaf(x, exact), ops.GateParameters(*(leaf(p, exact) for p in parameters))
    statistics = ops.GateStatistics(*(buffer(s, exact) for s in statistics))
    out = function(x, parameters, statistics, options, buffer(noise, exact))
    generator = torch.Generator().manual_seed(7)
    loss = 0
    for part in parts:
        value = getattr(out, part)
        weight = torch.randn(value.shape, generator=generator).to(value.device)
        loss = loss + (value.double() * weight.double()).sum()
    loss.backward()
    gradients = {"x": x.grad} | {n: p.grad for n, p in zip(NAMES, parameters, strict=True) if p is not None}
    buffers = {n: s for n, s in zip(statistics._fields, statistics, strict=True) if s is not None}
    return Case({"open_rate": out.open_rate, "logits": out.logits, "gate": out.gate}, gradients, buffers)


def check(x, parameters, statistics, options, noise=None, **tolerance):
    exact = run(ops.gate_reference, True, x, parameters, statistics, options, noise)
    assert (exact.outputs["logits"].abs() > 1e-4).all(), "a decision of this seed is too close to call"
    kernel = run(ops.gate, False, x, parameters, statistics, options, noise)
    assert_close(kernel, exact, **tolerance)
    return kernel


@pytest.mark.parametrize("estimator", ops.ESTIMATORS)
@pytest.mark.parametrize("hidden", [16, None])
def test_every_estimator(device, estimator, hidden):
    x = torch.randn(5, 3, 7, 5).to(device)
    noise = torch.rand(5, 4).to(device) if estimator in ("gumbel", "bernoulli") else None
    check(x, *make(device, 3, hidden, 4), ops.GateOptions(estimator), noise)


@pytest.mark.parametrize("batch", [2, 3, 16])
@pytest.mark.parametrize(("channels", "gates"), [(1, 1), (16, 1), (17, 33)])
def test_batches_and_tile_edges(device, batch, channels, gates):
    x = torch.randn(batch, channels, 3, 3).to(device)
    check(x, *make(device, channels, 16, gates), ops.GateOptions())


@pytest.mark.parametrize("hidden", [1, 9, 33])
def test_other_hidden_sizes(device, hidden):
    check(torch.randn(4, 5, 2, 3).to(device), *make(device, 5, hidden, 3), ops.GateOptions())


def test_rows_beyond_one_tile(device):
    """Tails look at 64 samples at a time; features (N, K) are cheap to make many of."""
    check(torch.randn(130, 5).to(device), *make(device, 5, 16, 3), ops.GateOptions())
    check(torch.randn(70, 5).to(device), *make(device, 5, None, 3), ops.GateOptions("batch_mean"))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "every second channel", "crop", "one pixel", "transposed"])
@pytest.mark.parametrize("flatten", [False, True])
def test_layouts(device, layout, flatten):
    x = torch.randn(4, 6, 5, 7).to(device)
    x = {
        "nchw": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "every second channel": x[:, ::2],
        "crop": x[:, :, 1:, 2:5],
        "one pixel": x[:, :, :1, :1],
        "transposed": x.transpose(2, 3),
    }[layout]
    features = x[0].numel() if flatten else x.shape[1]
    check(x, *make(device, features, 16, 2), ops.GateOptions(flatten=flatten))


def test_many_features_are_split(device):
    x = torch.randn(3, 70, 6, 6).to(device)
    check(x, *make(device, 70 * 36, 16, 2), ops.GateOptions(flatten=True))
    check(x, *make(device, 70, None, 70), ops.GateOptions())  # too many units to pool and multiply in one


def test_large_maps_are_split_by_channels(device, monkeypatch):
    monkeypatch.setattr(gate_kernels, "SPLIT_ABOVE", 1)
    check(torch.randn(3, 70, 3, 3).to(device), *make(device, 70, 16, 2), ops.GateOptions())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps(device, dtype):
    """Features are rounded before both runs, so logits agree as in fp32; d x is rounded after."""
    x = torch.randn(4, 5, 4, 4).to(device).to(dtype)
    parameters, statistics = make(device, 5, 16, 3)
    exact = run(ops.gate_reference, True, x, parameters, statistics, ops.GateOptions(dtype=torch.float64))
    kernel = run(ops.gate, False, x, parameters, statistics, ops.GateOptions())
    assert kernel.outputs["gate"].dtype == dtype and kernel.gradients["x"].dtype == dtype
    largest = exact.gradients["x"].abs().max().item()
    assert (kernel.gradients["x"].double() - exact.gradients["x"]).abs().max() <= torch.finfo(dtype).eps * largest
    # What comes in through the gate is rounded to its dtype: weights of the loss about 2, so eps is the unit.
    assert_close(kernel, exact, gradient=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("estimator", ["ste", "batch_mean", "gumbel"])
def test_eval_and_frozen_norm(device, estimator):
    x = torch.randn(3, 4, 3, 3).to(device)
    check(x, *make(device, 4, 16, 5), ops.GateOptions(estimator, training=False, batch_stats=False))
    check(x, *make(device, 4, 16, 5), ops.GateOptions(estimator, training=True, batch_stats=False))
    one = x[:1]
    check(one, *make(device, 4, 16, 5), ops.GateOptions(estimator, training=False, batch_stats=False))


def test_boundaries_are_those_of_equations_3_and_4(device):
    """1FC with weight 1 and bias 0 makes the feature the logit."""
    z = torch.tensor([-1.5, -1.0000001, -1.0, 0.0, 1e-30, 1.0, 1.0000001, float("nan")], device=device)
    parameters = ops.GateParameters(None, None, None, None, *(t.to(device) for t in (torch.ones(1, 1), torch.zeros(1))))
    statistics = ops.GateStatistics(open_rate=torch.zeros(1, device=device))
    x = z[:, None].clone().requires_grad_()
    out = ops.gate(x, parameters, statistics, ops.GateOptions())
    assert out.gate.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    out.gate.sum().backward()
    assert x.grad.flatten().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("parts", [("gate",), ("open_rate",), ("logits",)])
def test_each_output_alone_carries_its_gradient(device, parts):
    x = torch.randn(4, 3, 2, 2).to(device)
    arguments = (x, *make(device, 3, 16, 2), ops.GateOptions())
    assert_close(run(ops.gate, False, *arguments, parts=parts), run(ops.gate_reference, True, *arguments, parts=parts))


def test_repeats_are_equal_bit_for_bit(device):
    x = torch.randn(16, 8, 5, 5).to(device)
    arguments = (x, *make(device, 8, 16, 8), ops.GateOptions())
    first, second = (run(ops.gate, False, *arguments) for _ in range(2))
    for got, expected in zip(second, first, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_bias_before_the_norm_has_gradient_exactly_zero(device):
    case = run(ops.gate, False, torch.randn(4, 3, 2, 2).to(device), *make(device, 3, 16, 2), ops.GateOptions())
    assert not case.gradients["bias1"].any()


def test_one_sample_has_no_batch_statistics(device):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.gate(torch.randn(1, 3, 2, 2).to(device), *make(device, 3, 16, 2), ops.GateOptions())


def test_a_second_derivative_raises(device):
    x = torch.randn(4, 3, 2, 2, device=device, requires_grad=True)
    parameters, statistics = make(device, 3, 16, 2)
    parameters.weight2.requires_grad_()
    logits = ops.gate(x, parameters, statistics, ops.GateOptions()).logits
    (grad,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.square().sum().backward()
