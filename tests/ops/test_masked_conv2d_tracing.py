import pytest
import torch

from gatedconv.ops import _masked_conv2d_native, masked_conv2d
from tests.ops.conv_oracle import masked_conv2d_oracle
from tests.tolerances import assert_close

OUT_OPEN = torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool)
IN_OPEN = torch.tensor([1, 1, 0, 1], dtype=torch.bool)


def tensors(dtype=torch.float32, channels_last=False, requires_grad=False):
    x, w, b = (torch.randn(2, 4, 6, 5, dtype=dtype), torch.randn(5, 4, 3, 3, dtype=dtype), torch.randn(5, dtype=dtype))
    residual = torch.randn(2, 5, 3, 3, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_(requires_grad) for t in (x, w, b, residual)]


def layer(x, w, b, residual):
    return masked_conv2d(x, w, b, OUT_OPEN, IN_OPEN, stride=2, padding=1, residual=residual, relu=True)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 4, 3, 3))
        self.register_buffer("mask", OUT_OPEN.clone())

    def forward(self, x):
        return masked_conv2d(x, self.weight, None, self.mask, padding="same", relu=True)


@pytest.mark.parametrize(
    ("dtype", "channels_last", "per_sample"),  # every pair of values; all triples are slow
    [
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.float64, False, True),
        (torch.float64, True, False),
        pytest.param(torch.float32, False, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, True, False, marks=pytest.mark.slow),
        pytest.param(torch.float64, False, False, marks=pytest.mark.slow),
        pytest.param(torch.float64, True, True, marks=pytest.mark.slow),
    ],
)
def test_opcheck(dtype, channels_last, per_sample):
    assert _masked_conv2d_native.ready()
    x, w, b, residual = tensors(dtype, channels_last, requires_grad=True)
    mask = OUT_OPEN.expand(2, 5).contiguous() if per_sample else OUT_OPEN
    numbers = ([2, 2], [1, 1, 1, 1], [1, 1], 1)
    arguments = (x, w, b, mask, IN_OPEN, residual, *numbers, True)
    torch.library.opcheck(torch.ops.gatedconv.masked_conv2d.default, arguments)
    out = torch.ops.gatedconv.masked_conv2d.default(*arguments).detach()
    grad = torch.randn_like(out)
    x, w = x.detach(), w.detach()
    for needs in ([True] * 4, [True, False, True, False], [False, True, False, True]):
        for output in (out, None):
            backward = torch.ops.gatedconv.masked_conv2d_backward.default
            torch.library.opcheck(backward, (grad, x, w, mask, IN_OPEN, output, *numbers, needs))


@pytest.mark.parametrize("native", [True, False])
def test_gradcheck(monkeypatch, native):
    if not native:
        monkeypatch.setattr(_masked_conv2d_native, "ready", lambda: False)
    x, w, b, residual = tensors(torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x[:1, :, :3, :3], w, b, residual[:1, :, :2, :2])]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_in_one_graph_gives_the_same_output_and_gradients(monkeypatch, native, channels_last):
    if not native:
        monkeypatch.setattr(_masked_conv2d_native, "ready", torch.compiler.assume_constant_result(lambda: False))
    torch._dynamo.reset()
    leaves = tensors(channels_last=channels_last, requires_grad=True)
    expected = layer(*leaves)
    got = torch.compile(layer, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()
    for ours, plain in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_compiled_with_a_batch_of_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(Layer().eval(), fullgraph=True, dynamic=True)
    plain = compiled._orig_mod
    for batch in (2, 5):
        x = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(compiled(x), plain(x))


def test_exported_program_holds_the_operator_and_takes_any_batch():
    module, x = Layer().eval(), torch.randn(2, 4, 6, 6)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
    assert any("gatedconv.masked_conv2d" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(7, 4, 6, 6)
    expected = masked_conv2d_oracle(x, module.weight, None, OUT_OPEN, padding="same", relu=True)
    assert_close(program.module()(x), expected)


@pytest.mark.slow
def test_aot_inductor_package_runs_the_operator(tmp_path):
    module, x = Layer().eval(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(x), module(x))


def test_functional_gradient_equals_the_ordinary_one():
    x, w, b, residual = tensors()

    def loss(weight):
        return layer(x, weight, b, residual).square().sum()

    w.requires_grad_()
    (expected,) = torch.autograd.grad(loss(w), w)
    torch.testing.assert_close(torch.func.grad(loss)(w.detach()), expected)


def test_a_gradient_without_graph_refuses_to_be_differentiated_again():
    x, w, b, residual = tensors(requires_grad=True)
    out = layer(x, w, b, residual)
    grad = torch.randn_like(out).requires_grad_()
    made = torch.ops.gatedconv.masked_conv2d_backward(
        grad, x, w, OUT_OPEN, IN_OPEN, out, [2, 2], [1, 1, 1, 1], [1, 1], 1, [True] * 4
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        made[1].sum().backward()
