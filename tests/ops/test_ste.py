import pytest
import torch

from gatedconv.ops import ste, ste_reference

EDGES = [-2.0, -1.0 - 1e-7, -1.0, -0.5, -0.0, 0.0, 1e-30, 0.5, 1.0, 1.0 + 2e-7, 2.0, float("inf"), -float("inf")]


@pytest.mark.parametrize("function", [ste, ste_reference])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gate_and_gradient_follow_equations_3_and_4(function, dtype):
    logits = torch.tensor(EDGES, dtype=dtype, requires_grad=True)
    gate = function(logits)
    values = logits.tolist()
    assert gate.dtype == dtype
    assert gate.tolist() == [1.0 if value > 0 else 0.0 for value in values]
    weights = torch.arange(1, len(values) + 1, dtype=dtype)
    (grad,) = torch.autograd.grad((gate * weights).sum(), logits)
    assert grad.tolist() == [i + 1.0 if abs(value) <= 1 else 0.0 for i, value in enumerate(values)]


@pytest.mark.parametrize("function", [ste, ste_reference])
def test_nan_closes_the_gate_and_stops_the_gradient(function):
    logits = torch.tensor([float("nan"), 0.5], requires_grad=True)
    gate = function(logits)
    (grad,) = torch.autograd.grad(gate.sum(), logits)
    assert gate.tolist() == [0.0, 1.0] and grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("function", [ste, ste_reference])
def test_second_derivative_in_the_incoming_gradient(function):
    # The backward is linear in the incoming gradient with a mask that is constant almost everywhere.
    logits = torch.tensor([-0.5, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((function(logits) * scale).sum(), logits, create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), scale)
    assert again.tolist() == [1.0, 1.0, 0.0]


def test_compiles_in_one_graph_and_works_under_functional_transforms():
    logits = torch.tensor(EDGES)
    expected = (logits.abs() <= 1).float()
    torch._dynamo.reset()
    compiled = torch.compile(ste, fullgraph=True)
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    assert torch.equal(grad, expected)
    assert torch.equal(torch.func.grad(lambda z: ste(z).sum())(logits), expected)
    assert torch.equal(torch.vmap(ste)(logits[:, None]), ste(logits)[:, None])
    program = torch.export.export(_Gate(), (logits,))
    assert torch.equal(program.module()(logits), ste(logits))


class _Gate(torch.nn.Module):
    def forward(self, logits):
        return ste(logits)


@pytest.mark.parametrize("bad", [1.0, torch.tensor([1])])
def test_anything_but_floating_point_is_a_type_error(bad):
    with pytest.raises(TypeError, match="ste: logits must be a floating point tensor"):
        ste(bad)
