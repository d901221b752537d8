"""Kernels of out = gate * x, a gate (N, C) on the channels of a map (N, C, HW), and of both its gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import gradient_like, map_tiles, on_device, positions


@triton.jit
def gated_scale_forward(
    out_ptr,
    out_stride_n,
    out_stride_c,
    out_stride_s,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    gate_ptr,
    C,
    HW,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write gate * x; grid (N, C tiles)."""
    n = tl.program_id(0)
    row = n.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < HW)[None, :]
        x_at = x_ptr + row * x_stride_n + c[:, None] * x_stride_c + s[None, :] * x_stride_s
        out = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) * gate[:, None]
        out_at = out_ptr + row * out_stride_n + c[:, None] * out_stride_c + s[None, :] * out_stride_s
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_scale_backward(
    dx_ptr,
    dx_stride_n,
    dx_stride_c,
    dx_stride_s,
    d_gate_ptr,
    d_out_ptr,
    d_out_stride_n,
    d_out_stride_c,
    d_out_stride_s,
    x_ptr,
    x_stride_n,
    x_stride_c,
    x_stride_s,
    gate_ptr,
    C,
    HW,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write dx = gate * d_out and d_gate (N, C) = sum of d_out * x over HW; grid (N, C tiles)."""
    n = tl.program_id(0)
    row = n.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    d_gate = tl.zeros((BLOCK_C,), tl.float32)
    for s0 in range(0, HW, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < HW)[None, :]
        x_at = x_ptr + row * x_stride_n + c[:, None] * x_stride_c + s[None, :] * x_stride_s
        d_out_at = (
            d_out_ptr + row * d_out_stride_n + c[:, None] * d_out_stride_c + s[None, :] * d_out_stride_s
        )
        x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_at, mask=mask, other=0.0).to(tl.float32)
        d_gate += tl.sum(d_out * x, 1)
        dx_at = dx_ptr + row * dx_stride_n + c[:, None] * dx_stride_c + s[None, :] * dx_stride_s
        tl.store(dx_at, (d_out * gate[:, None]).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_ptr + n * C + c, d_gate.to(d_gate_ptr.dtype.element_ty), mask=c < C)


def forward(x: Tensor, gate: Tensor) -> Tensor:
    """Return gate (N, C) * x (N, C, H, W) in the layout of x and the dtype of the product."""
    x, strides = positions(x)
    out = gradient_like(x, torch.promote_types(x.dtype, gate.dtype))
    tiles, blocks = map_tiles(x)
    with on_device(x):
        gated_scale_forward[(x.shape[0], tiles)](
            out,
            *positions(out)[1],
            x,
            *strides,
            gate.contiguous(),
            x.shape[1],
            x.shape[2] * x.shape[3],
            **blocks,
        )
    return out


def backward(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gate."""
    x, strides = positions(x)
    d_out, d_out_strides = positions(d_out)
    gate = gate.contiguous()
    dx, d_gate = gradient_like(x, x.dtype), torch.empty_like(gate)
    tiles, blocks = map_tiles(x)
    with on_device(x):
        gated_scale_backward[(x.shape[0], tiles)](
            dx,
            *positions(dx)[1],
            d_gate,
            d_out,
            *d_out_strides,
            x,
            *strides,
            gate,
            x.shape[1],
            x.shape[2] * x.shape[3],
            **blocks,
        )
    return dx, d_gate
