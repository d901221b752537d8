"""What is not finite, boundaries and odd arguments: kernels do as the references do."""

from __future__ import annotations

import pytest
import torch

from gatedconv import ops
from tests.kernels.interpreted import test_gate, test_gated_residual
from tests.kernels.interpreted.compare import buffer, leaf
from tests.tolerances import assert_close

VALUES = (float("nan"), float("inf"), -float("inf"))


def assert_same(kernel, reference):
    """Equal where finite, and not finite in the same places in the same way."""
    for group in ("outputs", "gradients", "buffers"):
        found, expected = getattr(kernel, group), getattr(reference, group)
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            assert_close(found[name], want, algorithm="gradient", name=f"{group} {name}")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("hidden", [16, None])
@pytest.mark.parametrize("estimator", ["ste", "batch_mean", "bernoulli"])
def test_a_gate_that_reads_what_is_not_finite(device, value, hidden, estimator):
    x = torch.randn(4, 3, 2, 2).to(device)
    x[1, 2, 0, 1] = value
    parameters, statistics = test_gate.make(device, 3, hidden, 2)
    noise = torch.rand(4, 2).to(device) if estimator == "bernoulli" else None
    arguments = (x, parameters, statistics, ops.GateOptions(estimator), noise)
    runs = [test_gate.run(function, False, *arguments) for function in (ops.gate, ops.gate_reference)]
    for case in runs:
        case.gradients.pop("bias1", None)  # exactly 0 by kernels; the reference computes what the norm removes
    assert_same(*runs)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["x", "shortcut"])
def test_a_block_end_that_reads_what_is_not_finite(device, value, where):
    x, shortcut, layer = test_gated_residual.draw(device, 4, 3, 2, 3)
    (x if where == "x" else shortcut)[2, 1, 1, 1] = value
    inner = "1fc" if where == "shortcut" else None
    runs = [
        test_gated_residual.run(function, False, x, shortcut, layer, inner)
        for function in (ops.gated_residual, ops.gated_residual_reference)
    ]
    assert_same(*runs)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflown_gradient_stops_at_the_window(device, value):
    """As GradScaler relies on: outside of the estimator's window a gradient is 0, whatever it was."""
    z = torch.tensor([[-2.0], [0.5], [2.0]], device=device)
    gradients = []
    for function in (ops.gate, ops.gate_reference):
        x = z.clone().requires_grad_()
        one = ops.GateParameters(*[None] * 4, torch.ones(1, 1, device=device), torch.zeros(1, device=device))
        out = function(x, one, ops.GateStatistics(open_rate=torch.zeros(1, device=device)), ops.GateOptions())
        gradients.append(torch.autograd.grad(out.gate, x, torch.full_like(z, value))[0])
    torch.testing.assert_close(*gradients, equal_nan=True)
    assert gradients[0][0] == 0 and gradients[0][2] == 0


@pytest.mark.parametrize("estimator", ["gumbel", "bernoulli"])
def test_noise_of_any_layout_and_its_ends(device, estimator):
    """Noise that is transposed in memory, 0, or so close to 1 that it rounds to it."""
    x = torch.randn(5, 3, 2, 2).to(device)
    noise = torch.rand(4, 5).to(device).t()
    noise[0, 0], noise[1, 1], noise[2, 2] = 0.0, 1.0, 1e-42
    arguments = (x, *test_gate.make(device, 3, 16, 4), ops.GateOptions(estimator), noise)
    runs = [test_gate.run(function, False, *arguments) for function in (ops.gate, ops.gate_reference)]
    for case in runs:
        case.gradients.pop("bias1")
        assert all(value.isfinite().all() for value in case.gradients.values())
    assert_same(*runs)


def test_noise_in_another_precision_is_the_references(device):
    x, noise = torch.randn(5, 3, 2, 2).to(device), torch.rand(5, 4, dtype=torch.float64).to(device)
    parameters, statistics = test_gate.make(device, 3, 16, 4)
    out = ops.gate(x, parameters, statistics, ops.GateOptions("bernoulli"), noise)
    copies = ops.GateStatistics(*(buffer(s, False) for s in statistics))
    assert torch.equal(out.gate, ops.gate_reference(x, parameters, copies, ops.GateOptions("bernoulli"), noise).gate)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 3, 1), (2, 3, 0, 1), (1, 0, 2, 3)])
@pytest.mark.parametrize("which", ["x", "shortcut", "both"])
def test_maps_dense_in_any_order(device, order, which):
    """Strides of (N, C, H, W) in any order, the gradients' too."""
    x, shortcut, layer = test_gated_residual.draw(device, 3, 4, 5, 6)

    def laid_out(t):
        inverse = [order.index(i) for i in range(4)]
        return t.permute(order).contiguous().permute(inverse)

    x = laid_out(x) if which != "shortcut" else x
    shortcut = laid_out(shortcut) if which != "x" else shortcut
    test_gated_residual.check(x, shortcut, layer, "1fc")
    if which == "x":
        gate, weight = torch.rand(3, 4).to(device), torch.randn(3, 4, 5, 6).to(device)
        results = []
        for function in (ops.gated_scale, ops.gated_scale_reference):
            leaves = leaf(x, False), leaf(gate, False)
            out = function(*leaves)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
        for got, want in zip(*results, strict=True):
            assert_close(got, want)


def test_a_gate_that_flattens_a_map_dense_in_another_order(device):
    x = torch.randn(4, 3, 5, 2).to(device).permute(0, 1, 3, 2)
    test_gate.check(x, *test_gate.make(device, 30, 16, 2), ops.GateOptions(flatten=True))
