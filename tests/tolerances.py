"""The one table of tolerances: how far two results may differ, by dtype and algorithm, and why.

Errors are measured as the exactness contract measures them: max|a - b| / max|b| over one tensor. An element that is
small because its terms cancel is as inexact as its terms, so errors of single elements relative to themselves mean
nothing.

Sums of K products. With unit roundoff u, any order of summation is off by at most K u sum|x w| (Higham, "Accuracy and
Stability of Numerical Algorithms", section 3.1). That bound is never reached: rounding errors are as often up as
down, and of terms of random sign the partial sum of k terms has a size of sqrt(k) sigma, so that the error is about u
sigma sqrt(1 + 2 + ... + K) = u sigma K / sqrt(2), while the largest of the results is about 4 sigma sqrt(K). Relative
to it, the largest of many errors (4 times the usual one) is 0.7 sqrt(K) u. Measured, for sequential sums of 9 to
10,000 products: 0.71 to 0.73 sqrt(K) u; for `Engine` at 9 to 4,608 products: 0.57 to 0.83 sqrt(K) u. ``SAFETY``
covers the rounding of the expected value, which has the same size, terms of one sign, and the luck of the seed.

Winograd's algorithms multiply that error, because they form products that are larger than the result and cancel. With
matrices A, G, B of y = A^T [(G g) * (B^T d)], g and d of independent entries, the root mean square of the products
that make an output, over that of the output itself, is, in one dimension, max_i sqrt(sum_k A_ki^2 |G_k|^2 |B_k|^2 /
3), and in two dimensions its square: 1.67 for F(2 x 2, 3 x 3) at 0, 1, -1; 8.77 for F(4 x 4, 3 x 3) at 0, +-3/4,
+-3/2 (31.4 at the usual 0, +-1, +-2). Measured at K = 9: 1.0 and 4.3 sqrt(K) u.

Low precision: fp16, bf16 and tf32 round operands and results but add in fp32, so that the error hardly depends on K.
Terms of random sign make the operands' part about u / 2 of the largest result, the rounding of the result itself u at
most. Where PyTorch's own result of that type is at hand, the contract is the rule instead: at most twice PyTorch's
own error.

A backward pass through a norm subtracts means from the gradient before it divides by the deviation, which leaves less
than a tenth of the terms in few tensors: "gradient" is ten times the contract. Steps of training pass each step's
difference on to the next: "training" is a hundred times the contract, for tens of steps at the usual learning rates.
Metrics of such steps are means over samples, whose differences are as often up as down: "metrics" is ten times the
contract.

Relative to the sum of the magnitudes of K terms, about 0.64 K sigma, the largest of many errors, 4 u sigma K / sqrt(2),
is 4.4 u, however large K is: "magnitudes", of a single term.

Counts of MACs are whole numbers, and texts have a number of decimals: `WHOLE` and `in_decimals` allow for their
rounding, which is no matter of types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

SAFETY = 4.0
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    "tf32": 2.0**-11,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Whole networks and layers of any size: contract 1 of the design in fp32; the same margin above u in fp64.
CONTRACT = {torch.float32: 1e-5, torch.float64: 1e-12}
AMPLIFICATION = {
    "direct": 1.0,
    "network": 1.0,
    "winograd2": 1.67,
    "winograd4": 8.77,
    "gradient": 10.0,
    "metrics": 10.0,
    "training": 100.0,
    "magnitudes": 4.4,
}
# How far an algorithm may pass the contract; neither a network nor Winograd may.
BEYOND_CONTRACT = {"gradient": 10.0, "metrics": 10.0, "training": 100.0}
# Of one operation's error in low precision: sqrt(16) for a network of about 16 layers.
LOW_PRECISION = {"network": 4.0, "training": 10.0}
# Relative to the difference between the outputs of two images, a scale that may be far below the largest output: ten
# times the contract.
OF_TWO_IMAGES = 1e-4
# Functions of one number, at arguments of any size in one tensor: every value relative to itself. Next to 0 a factor
# of the result may be a subnormal number, which has fewer digits.
EACH_VALUE = {"rtol": CONTRACT[torch.float32], "atol": 1e-30}
# Against a whole number: MACs by ``count_macs``.
WHOLE = {"abs": 0.5}
# No rounding: statistics of 45 images as the mean of two ranks', of 21 and 24, whose images count by a fifteenth more
# and less than in those of all.
UNEVEN_SHARES = {"rtol": 0.1, "atol": 0.05}


def tolerance(dtype: torch.dtype | str = torch.float32, algorithm: str = "direct", terms: int | None = None) -> float:
    """Largest max|a - b| / max|b| of two results that differ by rounding alone.

    Args:
        dtype: A floating type of torch, or "tf32".
        algorithm: A key of ``AMPLIFICATION``.
        terms: Products summed for one output; None: many, as in a network, so that the contract alone holds.
    """
    u = UNIT_ROUNDOFF[dtype]
    if dtype not in CONTRACT:
        return SAFETY * u * LOW_PRECISION.get(algorithm, 1.0)
    contract = CONTRACT[dtype] * BEYOND_CONTRACT.get(algorithm, 1.0)
    if terms is None:
        return contract
    return min(contract, SAFETY * AMPLIFICATION[algorithm] * math.sqrt(max(terms, 1)) * u)


def floor(dtype: torch.dtype | str = torch.float32, algorithm: str = "direct") -> float:
    """Error, as a share of the scale, that is allowed however small PyTorch's own in that type is.

    Where tf32 is allowed PyTorch may compute in fp32 all the same: its own error is then not that of tf32. The
    root mean square error of a network in tf32, a share of that of its results, is below u.
    """
    if dtype == "tf32":
        return UNIT_ROUNDOFF["tf32"] if algorithm == "network" else tolerance(dtype)
    return CONTRACT[torch.float32] if algorithm == "network" else max(UNIT_ROUNDOFF[dtype], 1e-6)


def near(
    expected: Any,
    dtype: torch.dtype | str = torch.float32,
    algorithm: str = "direct",
    terms: int | None = None,
    scale: float = 0.0,
) -> Any:
    """What equals a number, or each of a list or dict of numbers, within ``tolerance``.

    Args:
        expected: The numbers.
        dtype: The type that the computation ran in.
        algorithm: As in ``tolerance``.
        terms: As in ``tolerance``.
        scale: As in ``relative_error``.
    """
    limit = tolerance(dtype, algorithm, terms)
    return pytest.approx(expected, rel=limit, abs=scale * limit)


def in_decimals(expected: Any, places: int, sides: int = 1) -> Any:
    """What equals numbers but for writing ``sides`` of the two, one or both, with that many decimals.

    A unit of the last: half of it by rounding, half for the error of what was rounded, which may tip it.
    """
    return pytest.approx(expected, rel=0, abs=sides * 10.0**-places)


def relative_error(actual: Any, expected: Any, scale: float = 0.0) -> float:
    """max|a - b| / max|b| in fp64; infinite where only one of the two is NaN or the infinities differ.

    Args:
        actual: A tensor, an array or a number.
        expected: One of the same shape.
        scale: Size of the terms that make the result, where they may cancel altogether: max|b| counts as at least this.
    """
    a, b = (torch.as_tensor(each).detach().cpu().double() for each in (actual, expected))
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(
        a[~finite].nan_to_num(nan=0.5), b[~finite].nan_to_num(nan=0.5)
    ):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    error = float((a - b)[finite].abs().max())
    largest = max(float(b[finite].abs().max()), scale)
    return error / largest if largest else (math.inf if error else 0.0)


def assert_close(
    actual: Any,
    expected: Any,
    *,
    dtype: torch.dtype | str | None = None,
    algorithm: str = "direct",
    terms: int | None = None,
    scale: float = 0.0,
    name: str = "",
) -> None:
    """Fail where two tensors, or two mappings or sequences of tensors, differ by more than ``tolerance`` allows.

    Args:
        actual: A tensor, an array, a number, or a mapping or sequence of them.
        expected: The same, in any floating type; integers and flags must be equal.
        dtype: The type that the computation ran in; None: that of ``actual``.
        algorithm: As in ``tolerance``.
        terms: As in ``tolerance``.
        scale: As in ``relative_error``.
        name: Names the tensor in the message.
    """
    options: dict[str, Any] = {"dtype": dtype, "algorithm": algorithm, "terms": terms, "scale": scale}
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_close(actual[key], value, **options, name=f"{name} {key}".strip())
        return
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), name
        for index, value in enumerate(expected):
            assert_close(actual[index], value, **options, name=f"{name}[{index}]")
        return
    found = torch.as_tensor(actual)
    if not found.is_floating_point():
        assert torch.equal(found, torch.as_tensor(expected)), name
        return
    limit = tolerance(dtype or found.dtype, algorithm, terms)
    error = relative_error(found, expected, scale)
    assert error <= limit, f"{name or 'result'}: off by {error:.2e} of the largest value, {limit:.1e} allowed"


def assert_at_most_twice(actual: Any, plain: Any, exact: Any, name: str = "") -> None:
    """Contract 1 in low precision: at most twice the error that PyTorch's own result ``plain`` of that type makes."""
    ours, theirs = relative_error(actual, exact), relative_error(plain, exact)
    assert ours <= 2 * theirs, f"{name or 'result'}: off by {ours:.2e}, PyTorch by {theirs:.2e}"


def assert_no_worse(actual: Any, plain: Any, exact: Any, name: str = "") -> None:
    """At most the error that PyTorch's own result ``plain`` of that type makes.

    Of products alone in low precision: PyTorch rounds the same operands, and also every result.
    """
    ours, theirs = relative_error(actual, exact), relative_error(plain, exact)
    assert ours <= theirs, f"{name or 'result'}: off by {ours:.2e}, PyTorch by {theirs:.2e}"
