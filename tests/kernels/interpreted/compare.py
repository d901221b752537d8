"""Runs an operator by kernels in its own dtype, and by the reference in fp64 on the same numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.tolerances import tolerance


def leaf(tensor, exact):
    """A copy of its own with a gradient, in fp64 for the exact run."""
    if tensor is None:
        return None
    return (tensor.double() if exact else tensor.clone(memory_format=torch.preserve_format)).detach().requires_grad_()


def buffer(tensor, exact):
    """A copy of its own without a gradient."""
    if tensor is None:
        return None
    return tensor.double() if exact and tensor.is_floating_point() else tensor.clone()


class Case(NamedTuple):
    """Outputs, gradients and moved buffers of one run, by name."""

    outputs: dict
    gradients: dict
    buffers: dict


OUTPUT, GRADIENT = tolerance(torch.float32), tolerance(torch.float32, "gradient")


def assert_close(kernel, exact, *, output=OUTPUT, gradient=GRADIENT):
    """Outputs within ``output`` and gradients within ``gradient`` of the exact ones."""
    for name, expected in exact.outputs.items():
        error(name, kernel.outputs[name], expected, output)
    assert kernel.gradients.keys() == exact.gradients.keys()
    for name, expected in exact.gradients.items():
        error(f"gradient of {name}", kernel.gradients[name], expected, gradient)
    for name, expected in exact.buffers.items():
        error(f"buffer {name}", kernel.buffers[name], expected, output)


def error(name, got, expected, tolerance):
    """Fail, naming the tensor, where the error is above tolerance times the largest value (at least 1)."""
    assert got.shape == expected.shape, name
    worst = (got.detach().double() - expected.detach().double()).abs().max().item()
    scale = max(1.0, expected.detach().double().abs().max().item())
    assert worst <= tolerance * scale, f"{name}: off by {worst:.1e}, scale {scale:.1e}"
