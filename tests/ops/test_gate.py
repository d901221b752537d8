"""The gate operator on a CPU: its reference, and the registered pair that compiled graphs see, run by oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import gatedconv
from gatedconv import ops
from tests.ops.gate_oracle import gate_op


def make(features=3, hidden=4, gates=5, dtype=torch.float32):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    first = (draw(hidden, features), draw(hidden), 1 + 0.1 * draw(hidden), draw(hidden)) if hidden else (None,) * 4
    parameters = ops.GateParameters(*first, draw(gates, hidden or features), draw(gates))
    norm = (draw(hidden), 1 + draw(hidden).abs(), torch.tensor(0)) if hidden else (None,) * 3
    return parameters, ops.GateStatistics(*norm, torch.ones(gates, dtype=dtype), draw(gates))


def operator_arguments(x, parameters, statistics, options, noise=None):
    o, running = options, (statistics.mean, statistics.var, statistics.threshold)
    numbers = (o.flatten, o.eps, o.estimator, o.temperature, o.training, o.batch_stats, o.dtype or x.dtype)
    return gate_op.ForwardArguments(x, *parameters, noise, *running, *numbers)


def gate(x, estimator="ste", noise=None, temperature=1.0):
    return ops.gate(x, *make(), ops.GateOptions(estimator, temperature), noise)


def test_reference_is_table_2_written_out():
    parameters, statistics = make()
    x = torch.randn(6, 3, 2, 5)
    out = ops.gate(x, parameters, statistics, ops.GateOptions())
    h = F.linear(x.sum((2, 3)) / 10, parameters.weight1, parameters.bias1)
    n = (h - h.mean(0)) / torch.sqrt(((h - h.mean(0)) ** 2).mean(0) + 1e-5)
    z = F.linear((n * parameters.norm_weight + parameters.norm_bias).clamp(min=0), parameters.weight2, parameters.bias2)
    torch.testing.assert_close(out.logits, z)
    assert torch.equal(out.gate, (z > 0).float()) and torch.equal(out.open_rate, out.gate.mean(0))


def test_training_moves_the_buffers_and_evaluation_leaves_them():
    parameters, statistics = make()
    before = [s.clone() for s in statistics]
    x = torch.randn(6, 3)
    ops.gate(x, parameters, statistics, ops.GateOptions("batch_mean", training=False, batch_stats=False))
    assert all(torch.equal(a, b) for a, b in zip(before, statistics, strict=True))
    out = ops.gate(x, parameters, statistics, ops.GateOptions("batch_mean"))
    h = F.linear(x, parameters.weight1, parameters.bias1)
    expected = (
        0.9 * before[0] + 0.1 * h.mean(0),
        0.9 * before[1] + 0.1 * h.var(0),
        torch.tensor(1),
        0.9 * before[3] + 0.1 * out.open_rate,
        0.9 * before[4] + 0.1 * out.logits.mean(0),
    )
    for got, want in zip(statistics, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("estimator", ops.ESTIMATORS)
@pytest.mark.parametrize("hidden", [4, None])
@pytest.mark.parametrize("flatten", [False, True])
def test_registered_operators_equal_the_reference(estimator, hidden, flatten):
    """Closed-form gradients against autograd, in fp64."""
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    parameters, statistics = make(12 if flatten else 3, hidden, dtype=torch.float64)
    noise = torch.rand(6, 5, dtype=torch.float64) if estimator in ("gumbel", "bernoulli") else None
    options = ops.GateOptions(estimator, flatten=flatten)
    leaves = [t for t in (x, *parameters) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = ops.gate_reference(
        x, parameters, ops.GateStatistics(*(None if s is None else s.clone() for s in statistics)), options, noise
    )
    got = torch.ops.gatedconv.gate(*operator_arguments(x, parameters, statistics, options, noise))[:3]
    weights = [torch.randn_like(t) for t in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    pairs = zip(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("hidden", [4, None])
def test_gradcheck_of_the_logits(hidden, batch_stats):
    """Decisions are steps, whose straight-through gradient is no derivative: the oracle is the evidence for theirs."""
    parameters, statistics = make(3, hidden, dtype=torch.float64)
    options = ops.GateOptions(batch_stats=batch_stats, training=batch_stats)
    places = [i for i, t in enumerate(parameters) if t is not None]
    leaves = [torch.randn(6, 3, 2, 2, dtype=torch.float64), *(parameters[i] for i in places)]

    def reference(x, *values):
        given = dict(zip(places, values, strict=True))
        return ops.gate_reference(x, ops.GateParameters(*map(given.get, range(6))), statistics, options).logits

    def operator(x, *values):
        given = dict(zip(places, values, strict=True))
        arguments = operator_arguments(x, ops.GateParameters(*map(given.get, range(6))), statistics, options)
        return torch.ops.gatedconv.gate(*arguments)[2]

    for logits in (reference, operator):
        assert torch.autograd.gradcheck(logits, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (6, 12)])
@pytest.mark.parametrize("hidden", [4, None])
def test_opcheck(shape, hidden):
    flatten = len(shape) == 4
    parameters, statistics = make(12, hidden)
    leaves = ops.GateParameters(*(None if p is None else p.requires_grad_() for p in parameters))
    x = torch.randn(shape).requires_grad_()
    options = ops.GateOptions(flatten=flatten)
    opcheck(torch.ops.gatedconv.gate.default, operator_arguments(x, leaves, statistics, options))


def test_opcheck_of_a_permuted_input_and_of_backward():
    parameters, statistics = make(3)
    x = torch.randn(6, 3, 2, 4).contiguous(memory_format=torch.channels_last)
    arguments = operator_arguments(x, parameters, statistics, ops.GateOptions("batch_mean", dtype=torch.float16))
    opcheck(torch.ops.gatedconv.gate.default, arguments)
    gate, rate, logits, pooled, hidden, stat, threshold = torch.ops.gatedconv.gate(*arguments)
    assert gate.dtype == torch.float16
    saved = (pooled, logits, hidden, stat, threshold)
    weights = (parameters.weight1, parameters.norm_weight, parameters.norm_bias, parameters.weight2)
    options = ("batch_mean", 1.0, True, True, torch.float32)
    opcheck(torch.ops.gatedconv.gate_backward.default, (gate, None, logits, *saved, *weights, None, 8, True, *options))


@pytest.mark.parametrize("estimator", ["batch_mean", "ste"])
def test_compiled_operator_moves_buffers_in_one_graph(estimator):
    parameters, statistics = make()
    reference = ops.GateStatistics(*(s.clone() for s in statistics))
    options = ops.GateOptions(estimator)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(x):
        return gate_op._compiled(x, parameters, statistics, options, None)

    x = torch.randn(6, 3, 2, 2, requires_grad=True)
    out, expected = forward(x), ops.gate_reference(x, parameters, reference, options)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(statistics, reference, strict=True):
        torch.testing.assert_close(a, b)
    a, b = (torch.autograd.grad(t.logits.square().sum() + t.open_rate.sum(), x)[0] for t in (out, expected))
    torch.testing.assert_close(a, b)


def test_modules_compile_in_one_graph():
    torch.manual_seed(0)
    gate = gatedconv.ChannelGate(3, 4).train()
    x = torch.randn(6, 3, 4, 4)
    expected = gate(x)
    assert torch.equal(torch.compile(gate, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: gate(torch.ones(2, 3, dtype=torch.int64)), TypeError, "torch.int64"),
        (lambda: gate(torch.ones(2, 3, 1)), ValueError, r"got shape \(2, 3, 1\)"),
        (lambda: gate(torch.ones(2, 4)), ValueError, "gives 4 features"),
        (lambda: gate(torch.ones(2, 3), "argmax"), ValueError, "gate: .*got 'argmax'"),
        (lambda: gate(torch.ones(2, 3), "gumbel", temperature=-1.0), ValueError, "gate: temperature must be above 0"),
        (
            lambda: gate(torch.ones(2, 3), "gumbel", torch.rand(2, 4)),
            ValueError,
            r"noise must have shape \(2, 5\), got \(2, 4\)",
        ),
        (lambda: gate(torch.ones(1, 3)), ValueError, "more than 1 value per channel"),
        (lambda: ops.estimate(torch.ones(2, 3), "argmax"), ValueError, "estimate: .*got 'argmax'"),
        (lambda: ops.estimate(torch.ones(2, 3).long(), "ste"), TypeError, "estimate: logits must .*torch.int64"),
        (lambda: ops.estimate(torch.ones(2, 3), "gumbel", noise=torch.rand(2, 1)), ValueError, r"shape \(2, 3\)"),
        (lambda: ops.estimate(torch.ones(2, 3), "gumbel", temperature=0.0), ValueError, "temperature must be above 0"),
        (
            lambda: ops.global_average_pool(torch.ones(3, 4), torch.float32),
            ValueError,
            r"pool: x must be \(N, C, H, W\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
