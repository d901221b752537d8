"""Every kernel once, small, and no kernel of a library but PyTorch's own: what runs under compute-sanitizer."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from gatedconv import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("estimator", ops.ESTIMATORS)
@pytest.mark.parametrize("hidden", [16, None])
@pytest.mark.parametrize("pool", ["avg", "flatten"])
def test_a_gate(estimator, hidden, pool):
    gate = gatedconv.ChannelGate(5, hidden=hidden, estimator=estimator, pool=pool, feature_size=9).cuda().train()
    x = torch.randn(6, 5, 3, 3, device="cuda", requires_grad=True)
    gate(x).sum().backward()
    assert x.grad.isfinite().all()
    gate.eval()(x.detach())


def test_many_units():
    for hidden, gates in ((None, 70), (16, 300)):
        gate = gatedconv.ChannelGate(70, gates, hidden=hidden).cuda().train()
        x = torch.randn(3, 70, 2, 2, device="cuda", requires_grad=True)
        gate(x).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gates", ["layer", "channel", "both"])
def test_a_block_end(layout, gates):
    x, shortcut = (
        torch.randn(5, 6, 3, 7, device="cuda").contiguous(memory_format=layout).requires_grad_() for _ in range(2)
    )
    layer = torch.ones(5, 1, device="cuda", requires_grad=True) if gates != "channel" else None
    channel = None
    if gates != "layer":
        channel = ops.InnerGate(*gatedconv.ChannelGate(6).cuda().train().arguments(5, x.dtype))
    one = torch.ones(6, device="cuda")
    norm = ops.NormArguments(one.clone().requires_grad_(), one, one.clone(), one.clone(), torch.tensor(0).cuda())
    out = ops.gated_residual(x, shortcut, norm, layer, channel)
    (out.out.sum() + out.pooled.sum()).backward()
    assert x.grad.isfinite().all() and shortcut.grad.isfinite().all()


def test_a_gated_map():
    x = torch.randn(5, 6, 3, 7, device="cuda", requires_grad=True)
    gate = torch.rand(5, 6, device="cuda", requires_grad=True)
    ops.gated_scale(x, gate).sum().backward()
    assert x.grad.isfinite().all() and gate.grad.isfinite().all()
