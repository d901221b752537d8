"""Packs weights in the order in which the kernels read them (csrc/cpu/plan.h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # output channels of one packed panel
BF16_DEPTH = 32  # terms of a sum in bfloat16 come in multiples of this (csrc/cpu/bf16.h)

# G of F(2x2, 3x3) at 0, 1, -1, infinity and of F(4x4, 3x3) at 0, +-3/4, +-3/2, infinity; the data and inverse
# transforms that belong to them are in csrc/cpu/conv_winograd.h.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def pack_panels(weight: Tensor) -> Tensor:
    """(C_out, C_in, KH, KW) -> flat [panel][KH][KW][C_in][16], channels past C_out zero."""
    out_channels, in_channels, height, width = weight.shape
    padded = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -out_channels % PANEL))
    panels = padded.view(-1, PANEL, in_channels, height, width)
    return panels.permute(0, 3, 4, 2, 1).reshape(-1)


def pack_bf16(weight: Tensor) -> Tensor:
    """(C_out, C_in, KH, KW) -> flat [panel][K / 2][16][2] in bfloat16, as float32 words of one pair each.

    K is KH * KW * C_in, in this order, rounded up to 32 with zeros; so are channels past C_out.
    """
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    rows = F.pad(rows, (0, -rows.shape[1] % BF16_DEPTH, 0, -len(rows) % PANEL)).to(torch.bfloat16)
    pairs = rows.view(-1, PANEL, rows.shape[1] // 2, 2).transpose(1, 2)
    return pairs.contiguous().view(torch.float32).flatten()


def pack_depthwise(weight: Tensor) -> Tensor:
    """(C, 1, KH, KW) -> flat [KH][KW][C rounded up to 16]."""
    padded = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -weight.shape[0] % PANEL))
    return padded.permute(2, 3, 1, 0).reshape(-1)


def has_groups_of_8(weight: Tensor, groups: int) -> bool:
    """Whether a convolution (C_out, C_in / groups, KH, KW) has groups of 8 inputs and 8 outputs."""
    return groups > 1 and weight.shape[1] == 8 and weight.shape[0] == 8 * groups


def pack_groups_of_8(weight: Tensor) -> Tensor:
    """(C_out, 8, KH, KW) in groups of 8 -> flat [panel][KH][KW][8][16], a panel's two groups interleaved."""
    out_channels, _, height, width = weight.shape
    padded = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -out_channels % PANEL))
    return padded.view(-1, 2, 8, 8, height, width).permute(0, 4, 5, 3, 2, 1).reshape(-1)


def pack_winograd(weight: Tensor, tile: int) -> Tensor:
    """(C_out, C_in, 3, 3) -> flat [panel][(tile + 2)^2][C_in][16], transformed: G w G^T.

    Of the float32 weights that direct convolution reads, in float64, product by product and sum by sum:
    csrc/cpu/plan_weights.cpp makes the same bits of them.
    """
    g = winograd_weights(tile).tolist()

    def transform(w: Tensor, dim: int) -> Tensor:
        a, b, c = w.unbind(dim)
        return torch.stack([(x * a + y * b) + z * c for x, y, z in g], dim)

    return pack_panels(transform(transform(weight.float().double(), 2), 3).float())


def winograd_weights(tile: int) -> Tensor:
    """G (tile + 2, 3), float64: at point p_i (1, p, p^2) / prod_{k != i} (p - p_k), at infinity (0, 0, 1)."""
    points = _POINTS[tile]
    rows = []
    for i, p in enumerate(points):
        scale = 1.0
        for k, other in enumerate(points):
            scale *= p - other if k != i else 1.0
        rows.append([1.0 / scale, p / scale, p * p / scale])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")


def pack_grouped(weight: Tensor, groups: int) -> tuple[Tensor, int, list[int]]:
    """Pack a grouped convolution as panels of 16 outputs, each over the input channels that its groups read.

    Returns:
        Flat [panel][KH][KW][span][16] with zeros where an output does not read, the span, and every panel's
        first input channel.
    """
    out_channels, per_group, height, width = weight.shape
    outputs = out_channels // groups
    in_channels = per_group * groups
    starts, ends = [], []
    for first in range(0, out_channels, PANEL):
        last = min(first + PANEL, out_channels) - 1
        starts.append(first // outputs * per_group)
        ends.append((last // outputs + 1) * per_group)
    span = max(end - start for start, end in zip(starts, ends, strict=True))
    starts = [min(start, in_channels - span) for start in starts]
    dense = weight.new_zeros(len(starts) * PANEL, span, height, width)
    for channel in range(out_channels):
        at = channel // outputs * per_group - starts[channel // PANEL]
        dense[channel, at : at + per_group] = weight[channel]
    return pack_panels(dense), span, starts
