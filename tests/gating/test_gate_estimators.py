"""Estimators against their closed forms."""

from __future__ import annotations

import pytest
import torch

from gatedconv.gating import LayerGate
from gatedconv.gating.gates import Estimator
from gatedconv.ops import estimate
from tests.tolerances import assert_close


def estimator(name, num_gates=3, temperature=2 / 3):
    return Estimator(name, num_gates, temperature)


def gates(head, z):
    noise = head.draw_noise(*z.shape, z)
    return estimate(
        z, head.name, noise=noise, temperature=head.temperature, threshold=head.running_mean, training=head.training
    )


def test_ste_follows_equations_3_and_4_on_their_boundaries():
    z = torch.tensor([[-1.5, -1.0, -0.5], [0.0, 1e-30, 0.5], [1.0, 1.0000001, 3.0]], requires_grad=True)
    gate = gates(estimator("ste"), z)
    assert gate.tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]
    weight = torch.arange(1.0, 10.0).view(3, 3)
    (gate * weight).sum().backward()
    assert z.grad.tolist() == [[0, 2, 3], [4, 5, 6], [7, 0, 0]]


def test_gumbel_is_hard_in_training_with_the_gradient_of_its_soft_sample():
    z = torch.linspace(-2, 2, 300).view(100, 3).requires_grad_()
    head = estimator("gumbel", temperature=0.5).train()
    torch.manual_seed(5)
    gate = gates(head, z)
    torch.manual_seed(5)
    u = torch.rand(100, 3)
    soft = torch.sigmoid((z.detach() + torch.log(u / (1 - u))) / 0.5)
    assert torch.equal(gate, (soft > 0.5).float())
    (grad,) = torch.autograd.grad(gate.sum(), z)
    assert_close(grad, soft * (1 - soft) / 0.5, algorithm="gradient")


@pytest.mark.parametrize("name", ["gumbel", "bernoulli"])
def test_samples_have_the_probability_of_the_sigmoid(name):
    z = torch.tensor([-2.0, 0.0, 1.0]).expand(40_000, 3)
    torch.manual_seed(0)
    rate = gates(estimator(name).train(), z).mean(dim=0)
    # 5 standard deviations of a mean of 40,000 coin flips
    assert float((rate - torch.sigmoid(z[0])).abs().max()) <= 5 * 0.5 / 200


@pytest.mark.parametrize("name", ["ste", "gumbel", "bernoulli"])
def test_eval_is_deterministic_and_opens_above_zero(name):
    z = torch.randn(50, 3)
    head = estimator(name).eval()
    assert torch.equal(gates(head, z), (z > 0).float())
    assert torch.equal(gates(head, z), gates(head, z))


def test_bernoulli_gradient_is_that_of_the_probability():
    z = torch.randn(20, 3, requires_grad=True)
    gate = gates(estimator("bernoulli").train(), z)
    (grad,) = torch.autograd.grad(gate.sum(), z)
    p = torch.sigmoid(z.detach())
    torch.testing.assert_close(grad, p * (1 - p))


def test_batch_mean_thresholds_at_the_batch_mean_and_at_its_running_mean_in_eval():
    head = estimator("batch_mean").train()
    z = torch.tensor([[0.0, 5.0, -1.0], [2.0, 5.0, -3.0]], requires_grad=True)
    gate = gates(head, z)
    assert gate.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert torch.allclose(head.running_mean, torch.tensor([0.1, 0.5, -0.2]))
    head.eval()
    one = gates(head, torch.tensor([[0.05, 0.6, -0.1]]))
    assert one.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("name", ["ste", "gumbel", "bernoulli", "batch_mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_gate_is_exactly_zero_or_one(name, dtype):
    gate = gates(estimator(name).train(), torch.randn(64, 3, dtype=dtype))
    assert gate.dtype == dtype
    assert set(gate.unique().tolist()) == {0.0, 1.0}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="LayerGate: estimator must be one of .*'argmax'"):
        LayerGate(4, estimator="argmax")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        LayerGate(4, estimator="gumbel", temperature=0.0)
