import math

import numpy as np
import pytest
import torch

from tests.tolerances import AMPLIFICATION, SAFETY, UNIT_ROUNDOFF, assert_close, floor, relative_error, tolerance

POINTS = {"winograd2": (0.0, 1.0, -1.0), "winograd4": (0.0, 0.75, -0.75, 1.5, -1.5)}


def winograd_matrices(points):
    """A^T, G and B^T of F(m, 3) at these points and infinity; B^T follows from the identity that defines it."""
    n, m = len(points) + 1, len(points) - 1
    out, weights = np.zeros((m, n)), np.zeros((n, 3))
    for k, point in enumerate(points):
        out[:, k] = [point**i for i in range(m)]
        weights[k] = [point**j for j in range(3)]
    out[-1, -1] = weights[-1, -1] = 1
    identity, taps = np.zeros((m * 3, n)), np.zeros((m * 3, n))
    for i in range(m):
        for j in range(3):
            identity[i * 3 + j], taps[i * 3 + j, i + j] = out[i] * weights[:, j], 1
    return out, weights, np.linalg.lstsq(identity, taps, rcond=None)[0]


@pytest.mark.parametrize("algorithm", POINTS)
def test_amplification_of_winograd_follows_from_its_matrices(algorithm):
    out, weights, inputs = winograd_matrices(POINTS[algorithm])
    products = (weights**2).sum(1) * (inputs**2).sum(1)
    squared = ((out**2) @ products / 3).max()
    assert squared == pytest.approx(AMPLIFICATION[algorithm], rel=1e-2)


@pytest.mark.parametrize("terms", [9, 144, 1000])
def test_sums_keep_the_tolerance_and_come_near_it(terms):
    a, b = torch.randn(48, terms), torch.randn(terms, 48)
    total = torch.zeros(48, 48)
    for k in range(terms):
        total += a[:, k : k + 1] * b[k]
    error = relative_error(total, a.double() @ b.double())
    limit = SAFETY * math.sqrt(terms) * UNIT_ROUNDOFF[torch.float32]
    assert tolerance(torch.float32, terms=terms) == pytest.approx(limit)
    assert limit / 20 <= error <= limit / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rounding_passes_and_a_mistake_fails(dtype):
    exact = torch.randn(4, 50, dtype=torch.float64)
    assert_close(exact.to(dtype), exact)
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_close((exact * (1 + 2 * tolerance(dtype))).to(dtype), exact)


@pytest.mark.parametrize("terms", [1, 9, 144, 1000])
def test_the_floor_of_tf32_forgives_its_rounding_and_no_other(terms):
    """PyTorch's own error, where it computes in fp32, is a thousandth of that."""

    def rounded(x):
        return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    a, b = torch.randn(64, terms), torch.randn(terms, 64)
    exact = a.double() @ b.double()
    error = relative_error(rounded(a) @ rounded(b), exact)
    assert max(2 * relative_error(a @ b, exact), floor(torch.float32)) < error <= floor("tf32") / 2
    assert relative_error(a.bfloat16() @ b.bfloat16(), exact) > floor("tf32")
    assert floor(torch.float16) == UNIT_ROUNDOFF[torch.float16] and floor(torch.float16, "network") == 1e-5


def test_nan_infinity_and_zero():
    one = torch.tensor([1.0, float("nan"), float("inf")])
    assert relative_error(one, one) == 0
    assert relative_error(one, torch.tensor([1.0, 2.0, float("inf")])) == math.inf
    assert relative_error(one, torch.tensor([1.0, float("nan"), -float("inf")])) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.full((2,), 1e-30), torch.zeros(2)) == math.inf
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(AssertionError, match="shape"):
        relative_error(torch.zeros(2), torch.zeros(1, 2))
