"""The mean of a map: values against NumPy, and a gradient in the memory format of the map."""

from __future__ import annotations

import pytest
import torch

from gatedconv.ops import global_average_pool
from tests.tolerances import assert_close

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 1, 3, 3), (2, 7, 1, 1), (0, 3, 2, 2)])
def test_it_is_the_mean_of_each_map(layout: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    found = global_average_pool(x, torch.float64 if dtype == torch.float64 else torch.float32)
    expected = x.double().numpy().mean(axis=(2, 3))
    assert found.shape == shape[:2] and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, expected, terms=24)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_may_be_beyond_what_the_dtype_holds(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](torch.full((2, 3, 64, 64), 30.0, dtype=dtype))
    found = global_average_pool(x, dtype)
    assert found.dtype == dtype and torch.equal(found, torch.full((2, 3), 30.0, dtype=dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_it_can_be_mapped_over(layout: str) -> None:
    x = torch.stack([LAYOUTS[layout](torch.randn(2, 3, 4, 5)) for _ in range(3)])
    found = torch.vmap(lambda t: global_average_pool(t, torch.float32))(x)
    torch.testing.assert_close(found, x.mean((3, 4)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_of_a_map_has_its_memory_format(layout: str) -> None:
    """Else adding it to the gradient of the map's other use takes a pass across the grain of memory."""
    x = LAYOUTS[layout](torch.randn(4, 5, 3, 2)).to(torch.bfloat16).requires_grad_()
    (slope,) = torch.autograd.grad(global_average_pool(x, torch.float32)[1, 2], x)
    expected = torch.zeros(4, 5, 3, 2)
    expected[1, 2] = 1 / 6
    torch.testing.assert_close(slope, expected.to(torch.bfloat16))
    assert slope.stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_derivatives(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 2, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: global_average_pool(t, torch.float64) ** 2, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: global_average_pool(t, torch.float64) ** 2, x)
