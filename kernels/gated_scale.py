"""out = gate * x for a gate (N, C) on the channels of a map (N, C, HW), and both gradients in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .common import FIXED_ORDER, as_map, gradient_like, map_at, map_tiles


@triton.jit
def gated_scale_forward(out, x, gate_ptr, C, HW, BLOCK_C: constexpr, BLOCK_S: constexpr):
    """Write out = gate * x. Grid (N, C tiles)."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < HW)[None, :]
        product = tl.load(map_at(x, n, c, s), mask=mask, other=0.0).to(tl.float32) * gate[:, None]
        tl.store(map_at(out, n, c, s), product.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_scale_backward(dx, d_gate_ptr, d_out, x, gate_ptr, C, HW, BLOCK_C: constexpr, BLOCK_S: constexpr):
    """Write dx = gate * d_out and d_gate (N, C), the sum of d_out * x over HW. Grid (N, C tiles)."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < HW)[None, :]
        value = tl.load(map_at(x, n, c, s), mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(map_at(d_out, n, c, s), mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(grad * value, 1)
        tl.store(map_at(dx, n, c, s), (grad * gate[:, None]).to(dx.ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_ptr + n * C + c, total.to(d_gate_ptr.dtype.element_ty), mask=c < C)


def forward(x: Tensor, gate: Tensor) -> Tensor:
    """Return gate (N, C) * x (N, C, H, W) in the layout of x and the dtype of the product."""
    x_map = as_map(x)
    out = gradient_like(x, torch.promote_types(x.dtype, gate.dtype))
    tiles, blocks = map_tiles(x_map.ptr)
    sizes = (x.shape[1], x.shape[2] * x.shape[3])
    with torch.cuda.device_of(x):
        gated_scale_forward[(x.shape[0], tiles)](as_map(out), x_map, gate.contiguous(), *sizes, **blocks)
    return out


def backward(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gate."""
    x_map, gate = as_map(x), gate.contiguous()
    dx, d_gate = gradient_like(x, x.dtype), torch.empty_like(gate)
    tiles, blocks = map_tiles(x_map.ptr)
    sizes = (x.shape[1], x.shape[2] * x.shape[3])
    with torch.cuda.device_of(x):
        gated_scale_backward[(x.shape[0], tiles)](
            as_map(dx), d_gate, as_map(d_out), x_map, gate, *sizes, **blocks, **FIXED_ORDER
        )
    return dx, d_gate
