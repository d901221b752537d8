"""The gated map on a CPU: its reference, the registered pair that compiled graphs see, and its argument checks."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from gatedconv import ops
from tests.ops import gate_oracle  # noqa: F401, gives the operators bodies on the CPU

MAP = torch.ones(2, 3, 4, 4)


def map_and_gate(dtype=torch.float32):
    x = torch.randn(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.rand(2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_registered_operator_equals_the_reference(dtype):
    x, gate = (t.requires_grad_() for t in map_and_gate(dtype))
    opcheck(torch.ops.gatedconv.gated_scale.default, (x, gate))
    results = []
    for function in (torch.ops.gatedconv.gated_scale, ops.gated_scale_reference):
        out = function(x, gate)
        results.append([out, *torch.autograd.grad(out, (x, gate), torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_of_backward(dtype):
    x, gate = map_and_gate(dtype)
    opcheck(torch.ops.gatedconv.gated_scale_backward.default, (torch.randn(2, 3, 4, 5), x, gate))


def test_gradcheck():
    x, gate = (t.double().requires_grad_() for t in map_and_gate())
    for function in (torch.ops.gatedconv.gated_scale, ops.gated_scale_reference):
        assert torch.autograd.gradcheck(function, (x, gate))


@pytest.mark.parametrize(
    ("x", "gate", "kind", "message"),
    [
        (MAP, torch.ones(2, 1), ValueError, r"gate must have shape \(2, 3\)"),
        (MAP[0], torch.ones(2, 3), ValueError, r"x must be \(N, C, H, W\)"),
        (MAP, torch.ones(2, 3).bool(), TypeError, "gate must .*torch.bool"),
        ([[1.0]], torch.ones(1, 1), TypeError, "x must .*list"),
        (MAP, torch.ones(2, 3, device="meta"), ValueError, "gate must be on cpu, got meta"),
    ],
)
def test_bad_arguments_are_named(x, gate, kind, message):
    with pytest.raises(kind, match=f"gated_scale: {message}"):
        ops.gated_scale(x, gate)
