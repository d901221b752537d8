"""The end of a block by kernels against the fp64 reference, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from gatedconv.kernels import gated_residual as residual_kernels

from gatedconv import ops
from tests.kernels.interpreted import test_gate
from tests.kernels.interpreted.compare import Case, assert_close, buffer, leaf
from tests.tolerances import floor


def run(function, exact, x, shortcut, layer, inner, estimator="ste", noise=None):
    channels = x.shape[1]
    torch.manual_seed(3)
    parameters, statistics = test_gate.make(x.device, channels, 16 if inner != "1fc" else None, channels)
    affine = [1 + 0.3 * torch.randn(channels).to(x.device), 0.3 * torch.randn(channels).to(x.device)]
    x, shortcut, layer = (leaf(t, exact) for t in (x, shortcut, layer))
    weight, bias = (leaf(t, exact) for t in affine)
    moved = [torch.zeros(channels), torch.ones(channels), torch.tensor(0)]
    norm = ops.NormArguments(weight, bias, *(buffer(t.to(x.device), exact) for t in moved))
    channel = None
    if inner:
        parameters = ops.GateParameters(*(leaf(p, exact) for p in parameters))
        statistics = ops.GateStatistics(*(buffer(s, exact) for s in statistics))
        channel = ops.InnerGate(parameters, statistics, ops.GateOptions(estimator), buffer(noise, exact))
    out = function(x, shortcut, norm, layer, channel)
    values = {"out": out.out, "pooled": out.pooled}
    if out.channel is not None:
        values |= {"open_rate": out.channel.open_rate, "logits": out.channel.logits}
    generator = torch.Generator().manual_seed(7)
    loss = sum((v.double() * torch.randn(v.shape, generator=generator).to(v.device)).sum() for v in values.values())
    loss.backward()
    leaves = {"x": x, "shortcut": shortcut, "layer": layer, "weight": weight, "bias": bias}
    if inner:
        leaves |= dict(zip(test_gate.NAMES, parameters, strict=True))
    gradients = {name: t.grad for name, t in leaves.items() if t is not None}
    return Case(values, gradients, {"mean": norm.mean, "var": norm.var, "batches": norm.batches})


def check(x, shortcut, layer, inner, **options):
    exact = run(ops.gated_residual_reference, True, x, shortcut, layer, inner, **options)
    kernel = run(ops.gated_residual, False, x, shortcut, layer, inner, **options)
    assert_close(kernel, exact)
    return kernel


def draw(device, *shape):
    """A map whose mean is not 0, a shortcut, and a layer gate with both decisions in it."""
    x, shortcut = torch.randn(shape).to(device) + 0.5, torch.randn(shape).to(device)
    layer = torch.arange(shape[0], device=device).remainder(3).clamp(max=1).float()[:, None]
    return x, shortcut, layer


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("inner", [None, "2fc", "1fc"])
def test_every_combination_of_gates(device, layer, inner):
    x, shortcut, gate = draw(device, 5, 3, 7, 5)
    check(x, shortcut, gate if layer else None, inner)


@pytest.mark.parametrize("estimator", ["gumbel", "bernoulli", "batch_mean"])
def test_estimators_of_the_inner_gate(device, estimator):
    x, shortcut, gate = draw(device, 4, 3, 3, 3)
    noise = torch.rand(4, 3).to(device) if estimator != "batch_mean" else None
    check(x, shortcut, gate, "2fc", estimator=estimator, noise=noise)


@pytest.mark.parametrize("layouts", [(True, True), (True, False), (False, True)])
def test_layouts_may_differ(device, layouts):
    x, shortcut, gate = draw(device, 4, 70, 3, 3)
    x, shortcut = (
        t.contiguous(memory_format=torch.channels_last) if last else t
        for t, last in zip((x, shortcut), layouts, strict=True)
    )
    case = check(x, shortcut, gate, "2fc")
    assert case.outputs["out"].stride() == x.stride() and case.gradients["x"].stride() == x.stride()


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 17, 1, 9), (2, 5, 12, 12), (16, 2, 2, 2)])
def test_sizes_and_tile_edges(device, shape):
    x, shortcut, gate = draw(device, *shape)
    check(x, shortcut, gate, None)


def test_samples_share_programs(device, monkeypatch):
    monkeypatch.setattr(residual_kernels, "multiprocessors", lambda _: 1)
    x, shortcut, gate = draw(device, 7, 4, 3, 3)
    check(x, shortcut, gate, "2fc")


def test_a_shortcut_that_is_a_crop(device):
    x, shortcut, gate = draw(device, 3, 4, 6, 6)
    check(x[:, :, ::2, ::2], shortcut[:, :, ::2, ::2], gate, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps(device, dtype):
    """At most twice the error that PyTorch makes in that type against fp64.

    The interpreter truncates a bf16 where a GPU rounds it, which doubles the error.
    """
    allowed = 4 if dtype == torch.bfloat16 and device.type == "cpu" else 2
    x, shortcut, gate = draw(device, 4, 5, 4, 4)
    x, shortcut = x.to(dtype), shortcut.to(dtype)
    exact = run(ops.gated_residual_reference, True, x, shortcut, gate, None)
    kernel = run(ops.gated_residual, False, x, shortcut, gate, None)
    torch_ = run(ops.gated_residual_reference, False, x, shortcut, gate, None)
    assert kernel.outputs["out"].dtype == dtype
    for group in ("outputs", "gradients"):
        for name, expected in getattr(exact, group).items():
            ours, theirs = (
                (getattr(case, group)[name].double() - expected).abs().max().item() for case in (kernel, torch_)
            )
            assert ours <= allowed * theirs + floor(dtype, "network"), (name, ours, theirs)


def test_one_value_per_channel_raises(device):
    x, shortcut, _ = draw(device, 1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(ops.gated_residual, False, x, shortcut, None, None)


def test_repeats_are_equal_bit_for_bit(device):
    x, shortcut, gate = draw(device, 8, 8, 5, 5)
    first, second = (run(ops.gated_residual, False, x, shortcut, gate, "2fc") for _ in range(2))
    for got, expected in zip(second, first, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gated_scale(device, layout):
    gate = torch.tensor([[1.0, 0, 1], [0, 0.5, 1]], device=device)
    x = torch.randn(2, 3, 5, 13).to(device).contiguous(memory_format=layout)
    weight = torch.randn(2, 3, 5, 13).to(device)
    results = []
    for function, exact in ((ops.gated_scale_reference, True), (ops.gated_scale, False)):
        leaves = leaf(x, exact), leaf(gate, exact)
        out = function(*leaves)
        (out * weight).sum().backward()
        results.append(Case({"out": out}, {"x": leaves[0].grad, "gate": leaves[1].grad}, {}))
    assert_close(results[1], results[0])
    assert results[1].outputs["out"].stride() == x.stride()
