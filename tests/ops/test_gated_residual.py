"""The end of a gated block on a CPU: its reference against a block written out, and its argument checks."""

from __future__ import annotations

import pytest
import torch

from gatedconv import ops


def norm_of(channels):
    torch.manual_seed(0)
    weight, bias = 1 + 0.1 * torch.randn(channels), torch.randn(channels)
    return ops.NormArguments(weight, bias, torch.zeros(channels), torch.ones(channels), torch.tensor(0))


def test_reference_is_the_block_written_out():
    norm = norm_of(3)
    x, shortcut, layer = (
        torch.randn(4, 3, 2, 5),
        torch.randn(4, 3, 2, 5),
        torch.tensor([[1.0], [0], [1], [1]]),
    )
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
        (
            (torch.ones(2, 3, 2, 2).long(), torch.ones(2, 3, 2, 2)),
            TypeError,
            "x must be a floating point tensor",
        ),
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
