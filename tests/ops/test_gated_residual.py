"""The end of a gated block on a CPU: its reference against a block written out, and its argument checks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.library import opcheck

import gatedconv
from gatedconv import ops
from gatedconv.models import ResNet
from gatedconv.ops import _triton
from tests.ops import gate_oracle  # noqa: F401, gives the operators bodies on the CPU
from tests.tolerances import assert_close


def norm_of(channels):
    torch.manual_seed(0)
    weight, bias = 1 + 0.1 * torch.randn(channels), torch.randn(channels)
    return ops.NormArguments(weight, bias, torch.zeros(channels), torch.ones(channels), torch.tensor(0))


def test_reference_is_the_block_written_out():
    norm = norm_of(3)
    x, shortcut, layer = (torch.randn(4, 3, 2, 5), torch.randn(4, 3, 2, 5), torch.tensor([[1.0], [0], [1], [1]]))
    weight, bias = torch.randn(3, 3), torch.randn(3)
    gate = ops.GateParameters(None, None, None, None, weight, bias)
    inner = ops.InnerGate(gate, ops.GateStatistics(open_rate=torch.ones(3)), ops.GateOptions())
    out = ops.gated_residual(x, shortcut, norm, layer, inner)

    flat = x.transpose(0, 1).flatten(1)
    scaled = (x - flat.mean(1)[:, None, None]) / (flat.var(1, unbiased=False)[:, None, None] + 1e-5).sqrt()
    branch = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
    opened = (branch.mean((2, 3)) @ weight.t() + bias > 0).float()
    expected = (shortcut + layer[:, :, None, None] * opened[:, :, None, None] * branch).clamp(min=0)
    assert 0 < opened.mean() < 1
    torch.testing.assert_close(out.out, expected)
    torch.testing.assert_close(out.pooled, expected.mean((2, 3)))
    assert torch.equal(out.channel.gate, opened)
    torch.testing.assert_close(norm.mean, 0.1 * flat.mean(1))
    torch.testing.assert_close(norm.var, 0.9 + 0.1 * flat.var(1))
    assert norm.batches.item() == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.ones(2, 3, 2, 2).long(), torch.ones(2, 3, 2, 2)), TypeError, "x must be a floating point tensor"),
        ((torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 1)), ValueError, r"shortcut must .*got \(2, 3, 2, 1\)"),
        ((torch.ones(2, 4, 2, 2), torch.ones(2, 4, 2, 2)), ValueError, r"norm.weight must have shape \(4,\)"),
        ((torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 2), torch.ones(2, 3)), ValueError, r"shape \(2, 1\)"),
        ((torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)), ValueError, "more than 1 value per channel"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, message):
    x, shortcut, *layer = arguments
    with pytest.raises(kind, match=message):
        ops.gated_residual(x, shortcut, norm_of(3), *layer)


def residual_arguments(gates, layout=lambda x: x, dtype=torch.float64):
    """Arguments of the operator, and of its backward as a function of what the operator gave."""
    torch.manual_seed(0)
    x, shortcut = (layout(torch.randn(6, 4, 3, 5, dtype=dtype)) for _ in range(2))
    channels = x.shape[1]
    layer = torch.arange(6).remainder(2)[:, None].to(dtype) if gates in ("layer", "both") else None
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    tensors = [None] * 10
    if gates != "layer":
        hidden = None if gates == "1fc" else 3
        first = [draw(hidden, channels), *(draw(hidden) for _ in range(3))] if hidden else [None] * 4
        norm = [draw(hidden), draw(hidden).abs()] if hidden else [None] * 2
        tensors = [*first, draw(channels, hidden or channels), draw(channels), None, *norm, draw(channels)]
    affine = (1 + 0.1 * draw(channels), draw(channels))
    options = ("batch_mean", 0.7, True, True, dtype)
    arguments = (x, shortcut, layer, *affine, *tensors, 1e-5, 1e-4, *options)

    def backward(out):
        kept = (x, out[0], out[2], out[3], out[4], out[5], out[7], out[8], out[9], out[10], layer, *affine)
        gate = (tensors[0], tensors[2], tensors[3], tensors[4], None)
        given = (torch.ones_like(out[0]), torch.ones_like(out[1]), out[6] if tensors[4] is not None else None, None)
        return (*given, *kept, *gate, dtype, *options[:-1])

    return arguments, backward


def names(values, gates):
    """Outputs of the reference in the order of the operator's."""
    decision = [] if values.channel is None else [values.channel.open_rate, values.channel.logits]
    return [values.out, values.pooled, *decision]


@pytest.mark.parametrize("estimator", ops.ESTIMATORS)
@pytest.mark.parametrize("gates", ["layer", "1fc", "2fc", "both"])
def test_registered_operator_equals_the_reference(gates, estimator):
    """Closed-form gradients against autograd, in fp64."""
    (x, shortcut, layer, weight, bias, *rest), _ = residual_arguments(gates)
    parameters, (_, mean, var, threshold), (eps, gate_eps, _, temperature, *_) = rest[:6], rest[6:10], rest[10:]
    noise = torch.rand(6, 4, dtype=x.dtype) if estimator in ("gumbel", "bernoulli") and gates != "layer" else None
    leaves = [t for t in (x, shortcut, layer, weight, bias, *parameters) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    norm = ops.NormArguments(weight, bias, torch.zeros(4).double(), torch.ones(4).double(), torch.tensor(0), eps)
    channel = None
    if gates != "layer":
        batches = None if mean is None else torch.tensor(0)
        copies = [None if t is None else t.clone() for t in (mean, var)]
        statistics = ops.GateStatistics(*copies, batches, torch.ones(4).double(), threshold.clone())
        options = ops.GateOptions(estimator, temperature, eps=gate_eps)
        channel = ops.InnerGate(ops.GateParameters(*parameters), statistics, options, noise)
    expected = names(ops.gated_residual_reference(x, shortcut, norm, layer, channel), gates)
    options = (estimator, temperature, True, True, torch.float64)
    got = torch.ops.gatedconv.gated_residual(
        x, shortcut, layer, weight, bias, *parameters, noise, mean, var, threshold, eps, gate_eps, *options
    )
    got = [got[0], got[1]] if channel is None else [got[0], got[1], got[6], got[7]]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    weights = [torch.randn_like(t) for t in expected]
    pairs = (torch.autograd.grad(values, leaves, weights) for values in (got, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_with_a_layer_gate():
    """A channel gate's decision is a step, whose straight-through gradient is no derivative: see the test above."""
    arguments, _ = residual_arguments("layer")
    leaves, numbers = [*arguments[:2], torch.rand(6, 1, dtype=torch.float64), *arguments[3:5]], arguments[5:]

    def reference(x, shortcut, layer, weight, bias):
        norm = ops.NormArguments(weight, bias, torch.zeros(4).double(), torch.ones(4).double(), torch.tensor(0))
        return ops.gated_residual_reference(x, shortcut, norm, layer)[:2]

    def operator(*tensors):
        return torch.ops.gatedconv.gated_residual(*tensors, *numbers)[:2]

    for function in (reference, operator):
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("gates", ["layer", "1fc", "both"])
def test_opcheck(gates):
    channels_last = lambda x: x.contiguous(memory_format=torch.channels_last)  # noqa: E731
    arguments, backward = residual_arguments(gates, channels_last, torch.float32)
    leaves = tuple(
        t.requires_grad_() if isinstance(t, torch.Tensor) and i not in (12, 13, 14) else t
        for i, t in enumerate(arguments)
    )
    opcheck(torch.ops.gatedconv.gated_residual.default, leaves)
    with torch.no_grad():
        out = torch.ops.gatedconv.gated_residual(*arguments)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in backward(out)]
    opcheck(torch.ops.gatedconv.gated_residual_backward.default, detached)


@pytest.mark.parametrize("gate", ["both", "channel"])
@pytest.mark.parametrize("position", ["after", "middle"])
def test_networks_compile_through_the_operators(monkeypatch, gate, position):
    """As on a GPU: kernels are wanted, and a compiled graph calls them as operators."""
    model = ResNet(8, 3, gate, position, input_size=(1, 6, 6)).train()
    copied, x = copy.deepcopy(model), torch.randn(4, 1, 6, 6)
    expected = [model(x), *torch.autograd.grad(model(x).sum() + gatedconv.polarization_loss(model), model.conv1.weight)]
    monkeypatch.setattr(_triton, "_devices", lambda: ("cpu",))
    vars(_triton._devices)["_dynamo_marked_constant"] = True
    called = set()

    def backend(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes if "gatedconv" in str(node.target))
        return graph.forward

    compiled = torch.compile(copied, fullgraph=True, backend=backend)
    compiled(x)  # buffers move as often as in the run above
    out = compiled(x)
    grad = torch.autograd.grad(out.sum() + gatedconv.polarization_loss(copied), copied.conv1.weight)
    assert called == {"gatedconv.gate.default", "gatedconv.gated_residual.default"} - (
        {"gatedconv.gate.default"} if (gate, position) == ("channel", "after") else set()
    ) - ({"gatedconv.gated_residual.default"} if (gate, position) == ("channel", "middle") else set()) | (
        {"gatedconv.gated_scale.default"} if position == "middle" else set()
    )
    for got, want in zip([out, *grad], expected, strict=True):
        assert_close(got, want)
    for (name, got), want in zip(copied.state_dict().items(), model.state_dict().values(), strict=True):
        assert_close(got, want, name=name)
